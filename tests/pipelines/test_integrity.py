"""Files that are not what was written: found by their checksums, made anew, named in the log. Storage that fails, and is full."""

import datetime
import errno
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from training import assert_same_steps, train, write_pairs

from actors import storage
from actors.learner.checkpoint import Checkpoints
from actors.notices import FOLDER
from actors.settings import Objective, Training
from actors.storage import checksum
from jobs.config import build
from jobs.gsil_iterative import plan
from jobs.schemas import GsilConfig
from pipelines.records import intact, write_rows
from pipelines.run.artifacts import Run, Stage, StageError, write_json
from pipelines.run.manifests import in_order, read_manifest, write_manifest

ROW = pa.schema({"id": pa.string(), "ids": pa.list_(pa.int32())})
SAMPLES = Stage("samples", {})
PAIRS = Stage("pairs", {}, {"samples": SAMPLES})
TRAINING = Stage("training", {}, {"pairs": PAIRS})


class Job:
    """Three stages in a row; `salt` changes what the first makes, as a GPU's sums may. Remembers what ran."""

    def __init__(self, root: Path, salt: str = "", upto: int = 3):
        self.ran: list[str] = []
        self.run, stages = Run(root), (SAMPLES, PAIRS, TRAINING)
        self.run.verify(stages[:upto])
        for stage in stages[:upto]:
            self.run.do(self._work(salt), stage)

    def _work(self, salt: str) -> Any:
        def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
            (stage,) = stages
            self.ran.append(stage.name)
            read = [path.read_bytes() for source in stage.inputs.values() for path in run.directory(source).glob("data")]
            (run.directory(stage) / "data").write_bytes(b"".join(read) + f"{stage.name}{salt if stage is SAMPLES else ''}".encode())
            (run.directory(stage) / "metrics.jsonl").write_text(str(time.perf_counter_ns()))
            return {stage.name: {"rows": 3}}

        return work


def flip(path: Path, at: int = -1, bit: int = 0) -> None:
    """Turns one bit of a file, and leaves its size."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING):
        yield caplog


@pytest.mark.parametrize(("harm", "said"), [(flip, "its checksum is"), (cut, "6 bytes of 7"), (Path.unlink, "data is gone")])
def test_a_damaged_input_is_made_anew_before_it_is_read_and_nothing_else(
    harm: Callable[[Path], None], said: str, tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    undisturbed = Job(tmp_path / "undisturbed").run
    assert Job(tmp_path / "run", upto=2).ran == ["samples", "pairs"]
    # As left by a process that was killed behind its manifest.
    write_json(tmp_path / "run/samples/started.json", {"fingerprint": SAMPLES.fingerprint})
    harm(tmp_path / "run/samples/data")
    # What was made from it came from the intact file, and the same comes out again.
    assert Job(tmp_path / "run").ran == (["training"] if harm is flip else ["samples", "training"])
    if harm is flip:
        # Sizes are looked at each time, checksums when the data is read: only pairs read it, and they were done.
        shutil.rmtree(tmp_path / "run/pairs")
        assert Job(tmp_path / "run").ran == ["samples", "pairs"]
    assert "samples: " in warned.text and said in warned.text and "made anew" in warned.text
    for stage in (SAMPLES, PAIRS, TRAINING):
        assert (tmp_path / "run" / stage.name / "data").read_bytes() == (undisturbed.directory(stage) / "data").read_bytes()
    assert Job(tmp_path / "run").ran == []


def test_what_was_made_from_data_that_came_out_otherwise_is_made_anew_too(tmp_path: Path, warned: pytest.LogCaptureFixture) -> None:
    Job(tmp_path)
    cut(tmp_path / "samples/data")
    assert Job(tmp_path, salt="!").ran == ["samples", "pairs", "training"]
    assert "pairs: samples has other content now than it was made from" in warned.text
    assert (tmp_path / "training/data").read_bytes() == b"samples!pairstraining"
    assert Job(tmp_path, salt="!").ran == []


def test_an_attempt_that_began_with_other_data_is_thrown_away(tmp_path: Path) -> None:
    def dies(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        (run.directory(stages[0]) / "shard").write_text("of the old samples")
        raise KeyboardInterrupt

    run = Job(tmp_path, upto=1).run
    with pytest.raises(KeyboardInterrupt):
        run.do(dies, PAIRS)
    cut(tmp_path / "samples/data")
    Job(tmp_path, salt="!", upto=2)
    assert not (tmp_path / "pairs/shard").exists() and (tmp_path / "pairs/data").read_bytes() == b"samples!pairs"


def test_a_manifest_with_a_flipped_bit_is_none_whichever_it_is(tmp_path: Path, warned: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(path, {"name": "a", "numbers": {"accuracy": 0.25, 3: None}})
    whole, read = path.read_bytes(), read_manifest(path) or {}
    assert read == {"name": "a", "numbers": {"accuracy": 0.25, "3": None}}
    for at in range(len(whole)):
        path.write_bytes(whole)
        flip(path, at, at % 8)
        found = read_manifest(path)
        # Unseen stays a bit in a blank between values, or in the word "checksum" alone.
        assert found is None or found == found | read
    Job(tmp_path / "run")
    manifest = tmp_path / "run/pairs/manifest.json"
    manifest.write_text(manifest.read_text().replace('"rows": 3', '"rows": 7'))
    assert Job(tmp_path / "run").ran == ["pairs"] and "pairs: manifest.json is damaged" in warned.text


def test_a_shard_of_a_killed_attempt_is_known_to_be_whole_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    write_rows(path, [{"id": "a", "ids": [1, 2, 3]}, {"id": "gsil:xxh3", "ids": []}], ROW, {"dropped": 2})
    whole = path.read_bytes()
    assert intact(path) and pq.read_table(path).num_rows == 2 and pq.read_schema(path).metadata == {b"dropped": b"2"}
    for at in range(len(whole)):
        path.write_bytes(whole)
        flip(path, at, at % 8)
        assert not intact(path), f"byte {at}"
        path.write_bytes(whole[:at])
        assert not intact(path), f"{at} bytes"


def test_planning_a_hundred_iterations_reads_no_data_and_takes_under_two_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = plan(build(GsilConfig, ["--iterations.count", "100"])).stages()
    run = Run(tmp_path)

    def writes(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        for number in range(4):
            (run.directory(stages[0]) / f"{number:05d}.parquet").write_bytes(b"1234")
        return {}

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for stage in stages:
        run.do(writes, stage)
    monkeypatch.setattr(storage, "checksum", lambda path: pytest.fail("data was read"))
    started = time.process_time()
    again = Run(tmp_path)
    assert len(stages) > 500 and all(again.manifest(stage) for stage in plan(build(GsilConfig, ["--iterations.count", "100"])).stages())
    assert time.process_time() - started < 2


def test_data_is_read_once_a_process_and_only_for_a_stage_that_has_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Job(tmp_path)
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.parent.name)
        return checksum(path)

    monkeypatch.setattr(storage, "checksum", counted)
    Job(tmp_path)
    assert read == []
    shutil.rmtree(tmp_path / "training")
    Job(tmp_path)
    # The inputs when they are read, and what was made when it is finished.
    assert read == ["pairs"] * 2 + ["training"] * 2


def fails(errors: list[OSError | None]) -> Callable[[int], None]:
    """`os.fsync` of a storage that fails as told, call by call, and then works."""
    real, waiting = os.fsync, list(errors)

    def fsync(descriptor: int) -> None:
        if waiting and (error := waiting.pop(0)):
            raise error
        real(descriptor)

    return fsync


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def test_an_error_that_goes_away_is_tried_again_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr(os, "fsync", fails([error(errno.EIO), error(errno.ESTALE)]))
    write_rows(tmp_path / "a.parquet", [{"id": "a", "ids": [1]}], ROW)
    assert intact(tmp_path / "a.parquet") and [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    assert warned.text.count("a.parquet: Input/output error: tried again in 0.01 s") == 1 and "Stale file handle" in warned.text
    monkeypatch.setattr(os, "fsync", fails([error(errno.EIO)] * 3))
    with pytest.raises(StageError, match=r"b.parquet cannot be written: Input/output error .*same command continues"):
        write_rows(tmp_path / "b.parquet", [], ROW)
    assert not (tmp_path / "b.parquet").exists()


@pytest.mark.parametrize("when", range(4), ids=["started.json", "the shard", "manifest.json", "nothing"])
def test_a_full_disk_stops_the_stage_with_the_path_and_the_same_command_continues(
    when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        write_rows(run.directory(stages[0]) / "00000.parquet", [{"id": "a", "ids": [1]}], ROW)
        return {}

    path = ["started.json", "00000.parquet", "manifest.json", ""][when]
    monkeypatch.setattr(os, "fsync", fails([None] * when + [error(errno.ENOSPC)]))
    run = Run(tmp_path)
    if path:
        with pytest.raises(StageError, match=rf"samples.*{path} cannot be written: No space left .*free space.*same command continues"):
            run.do(work, SAMPLES)
        assert run.manifest(SAMPLES) is None and not (tmp_path / "samples" / path).exists()
        assert not list(tmp_path.rglob("*.tmp"))
    run.do(work, SAMPLES)
    assert run.manifest(SAMPLES) and intact(tmp_path / "samples/00000.parquet")


def test_slow_storage_only_takes_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: time.sleep(0.3))
    assert Job(tmp_path).ran == ["samples", "pairs", "training"] and Job(tmp_path).ran == []


def test_what_cannot_be_read_is_not_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Job(tmp_path, upto=2)

    def unreadable(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(storage, "checksum", unreadable)
    with pytest.raises(StageError, match=r"pairs: .*Input/output error.*: see to the storage; the same command continues"):
        Job(tmp_path)
    monkeypatch.undo()
    assert Job(tmp_path).ran == ["training"]


def test_clocks_that_differ_change_nothing(tmp_path: Path) -> None:
    Job(tmp_path)
    tomorrow = time.time() + 86_400
    manifest = tmp_path / "samples/manifest.json"
    content = read_manifest(manifest)
    assert content
    write_manifest(manifest, content | {"finished": (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)).isoformat()})
    for path in tmp_path.rglob("*"):
        os.utime(path, (tomorrow, tomorrow) if path.parent.name == "samples" else (0, 0))
    assert Job(tmp_path).ran == []
    manifests = [found for path in tmp_path.rglob("manifest.json") if (found := read_manifest(path))]
    assert [found["name"] for found in in_order(manifests)] == ["samples", "pairs", "training"]


def test_damaged_checkpoints_are_passed_over_for_the_one_before(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notices, checkpoints = tmp_path / "notices", tmp_path / "run/checkpoints"
    monkeypatch.setenv(FOLDER, str(notices))
    pairs = write_pairs(tiny, tmp_path / "pairs.parquet")

    def trained() -> list[dict[str, float]]:
        options = {"epochs": 3, "checkpoint_every": 2, "checkpoints_kept": 3, "zero_stage": 2}
        return train(tiny, pairs, tmp_path / "run", 1, Objective(), **options)

    def told() -> str:
        return " ".join(path.read_text() for path in notices.glob("*.txt"))

    whole = trained()
    flip(next((checkpoints / "step-000006").glob("*optim_states.pt")), 1000)
    again = trained()
    assert again[:4] == whole[:4], "they carry tokens per second: taken again they would differ"
    assert_same_steps(again, whole)
    assert "step-000006: " in told() and "optim_states.pt is damaged: its checksum" in told() and "goes on behind step 4" in told()
    cut(next((checkpoints / "step-000006").glob("*model_states.pt")))
    (checkpoints / "step-000004/done.json").write_text("{")
    again = trained()
    assert again[:2] == whole[:2]
    assert_same_steps(again, whole)
    assert "model_states.pt is damaged: " in told() and "done.json is damaged" in told() and "goes on behind step 2" in told()


def _chooses(rank: int, root: Path) -> None:
    """A worker, to whose node nothing has come yet if it is not the first."""
    dist.init_process_group("gloo", init_method=f"file://{root / 'meeting'}", rank=rank, world_size=2)
    checkpoints = Checkpoints(root / ("checkpoints", "late")[rank], Training(), {})
    found = checkpoints.newest()
    # No engine: what is there need not be written again.
    checkpoints.save(None, 2)
    (root / f"{rank}.json").write_text(json.dumps(found))


def test_all_workers_go_on_from_the_checkpoint_that_the_first_one_sees(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints/step-000002"
    step.mkdir(parents=True)
    done: dict[str, Any] = {"step": 2, "world": 2, "zero_stage": Training().zero_stage, "architecture": {}, "files": {}, "checksums": {}}
    (step / "done.json").write_text(json.dumps(done))
    workers = [multiprocessing.get_context("spawn").Process(target=_chooses, args=(rank, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        worker.kill()
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [done | {"path": str(step)}] * 2
