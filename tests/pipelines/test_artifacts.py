"""Stages: fingerprints, manifests, skipping, throwing away what another attempt left."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.config import build
from jobs.gsil_iterative import plan
from jobs.schemas import GsilConfig
from pipelines.run.artifacts import Run, Stage, StageError, write_json
from pipelines.run.lock import locked

ROOT = Path(__file__).resolve().parents[2]


def writer(calls: list[str]) -> Any:
    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        for stage in stages:
            calls.append(stage.name)
            (run.directory(stage) / "data.txt").write_text("data")
        return {stage.name: {"rows": 1} for stage in stages}

    return work


def test_a_finished_stage_is_skipped_and_a_changed_one_is_made_anew(tmp_path: Path) -> None:
    calls: list[str] = []
    first = Stage("a", {"x": 1})
    second = Stage("b", {}, {"a": first})
    for _ in range(2):
        run = Run(tmp_path)
        run.do(writer(calls), first)
        run.do(writer(calls), second)
    assert calls == ["a", "b"]
    assert [entry["skipped"] for entry in run.log] == [True, True]
    changed = Stage("a", {"x": 2})
    (tmp_path / "a" / "stale.txt").write_text("of the old settings")
    Run(tmp_path).do(writer(calls), changed)
    Run(tmp_path).do(writer(calls), Stage("b", {}, {"a": changed}))
    assert calls == ["a", "b", "a", "b"]
    assert not (tmp_path / "a" / "stale.txt").exists()


def test_checkpoints_go_when_their_stage_is_done(tmp_path: Path) -> None:
    def trains(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        directory = run.directory(stages[0])
        for file in ("checkpoints/step-5/state", "model"):
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            (directory / file).write_text("weights")
        if len(list(tmp_path.glob("tries/*"))) == 0:
            (tmp_path / "tries/1").mkdir(parents=True)
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).do(trains, Stage("a", {}))
    assert (tmp_path / "a/checkpoints/step-5/state").exists(), "an attempt that was stopped goes on from them"
    run = Run(tmp_path)
    run.do(trains, Stage("a", {}))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["manifest.json", "model"] and run.manifest(Stage("a", {}))


def test_an_interrupted_stage_keeps_the_files_of_its_own_settings_only(tmp_path: Path) -> None:
    def dies(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        (run.directory(stages[0]) / "shard-0").write_text("done")
        raise KeyboardInterrupt

    def sees(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        kept = (run.directory(stages[0]) / "shard-0").exists()
        (run.directory(stages[0]) / "shard-1").write_text("done")
        return {stages[0].name: {"kept": kept}}

    for changed, kept in ((1, True), (2, False)):
        with pytest.raises(KeyboardInterrupt):
            Run(tmp_path / str(changed)).do(dies, Stage("a", {"x": 1}))
        run, stage = Run(tmp_path / str(changed)), Stage("a", {"x": changed})
        run.do(sees, stage)
        assert run.numbers(stage) == {"kept": kept}


def test_a_stage_that_left_nothing_is_not_done(tmp_path: Path) -> None:
    run, stage = Run(tmp_path), Stage("a", {})
    with pytest.raises(StageError, match=r"a: nothing is in .* storage that every node mounts"):
        run.do(lambda run, stages: {}, stage)
    assert run.manifest(stage) is None


@pytest.mark.parametrize("damage", ["", "{", "[]"])
def test_a_damaged_manifest_or_a_missing_file_means_not_done(damage: str, tmp_path: Path) -> None:
    run, stage = Run(tmp_path), Stage("a", {})
    run.do(writer([]), stage)
    manifest = tmp_path / "a" / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(damage)
    assert run.manifest(stage) is None
    manifest.write_text(whole)
    assert run.manifest(stage)
    (tmp_path / "a" / "data.txt").write_text("da")
    assert run.manifest(stage) is None


def test_the_manifest_says_where_everything_came_from(tmp_path: Path) -> None:
    first = Stage("a", {"x": 1})
    run, stage = Run(tmp_path), Stage("b", {"y": 2}, {"data": first})
    run.do(writer([]), stage)
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["inputs"] == {"data": {"name": "a", "fingerprint": first.fingerprint}}
    assert manifest["files"] == {"data.txt": 4} and manifest["settings"] == {"y": 2} and manifest["numbers"] == {"rows": 1}
    assert manifest["versions"]["ray"] and manifest["seconds"] >= 0


def test_write_json_leaves_nothing_half_written(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    hold = "import sys, time; from pathlib import Path; from pipelines.run.lock import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(StageError, match=f"in use by another process .pid {holder.pid} "), locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path):
        pass


def test_storage_without_locks_is_not_called_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(StageError, match=r"cannot be locked: No locks available: its storage has to give file locks"), locked(tmp_path):
        pass


DEFAULT = {stage.name: stage.fingerprint for stage in plan(GsilConfig()).stages()}


@pytest.mark.parametrize(
    ("override", "rerun"),
    [
        (["--objective.beta", "0.2"], {"iteration-1/training", "iteration-2"}),
        (["--negatives.temperature", "0.7"], {"iteration-1/negatives", "iteration-1/pairs", "iteration-1/training", "iteration-2"}),
        (["--negatives.truncated", "drop"], {"iteration-1/pairs", "iteration-1/training", "iteration-2"}),
        (["--evaluation.max_new_tokens", "64"], {"samples", "evaluation"}),
        (["--sft.epochs", "3"], {"sft", "iteration-1", "iteration-2"}),
        (["--iterations.count", "3"], set()),
        (["--engine.max_actors", "4"], set()),
        (["--training.workers", "2"], set()),
        (["--training.micro_batch_tokens", "99"], set()),
        (["--scoring.max_batch_tokens", "99"], set()),
        (["--run.name", "other"], set()),
        (["--demonstrations.limit", "10"], {"demonstrations", "base/samples", "base/evaluation", "sft", "iteration-1", "iteration-2"}),
    ],
)
def test_a_changed_value_reruns_exactly_what_depends_on_it(override: list[str], rerun: set[str]) -> None:
    now = {stage.name: stage.fingerprint for stage in plan(build(GsilConfig, override)).stages()}
    changed = {name for name, fingerprint in DEFAULT.items() if now[name] != fingerprint}
    expected = {name for name in DEFAULT if any(name == r or name.startswith(f"{r}/") or name.endswith(f"/{r}") for r in rerun)}
    # What an iteration's policy answers depends on its training.
    expected |= {
        name
        for name in DEFAULT
        if name.startswith("iteration-1/") and "iteration-1/training" in rerun and name.rpartition("/")[2] in ("samples", "evaluation")
    }
    assert changed == expected
