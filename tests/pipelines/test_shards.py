"""The pool of actors: what a person reads when an actor fails, and what stays."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle

from actors.settings import Engine, Pool, Sampling
from pipelines import generation
from pipelines.records import write_rows
from pipelines.run.artifacts import Display, Run, Stage, StageError
from pipelines.run.restarts import restarts
from pipelines.workers import shards as shards_of
from pipelines.workers.actor_pool import Adapter, named
from pipelines.workers.shards import Shard, _made, map_shards
from pipelines.workers.tally import Tally

# Ray's workers cannot import a test: the class travels with the task.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
SAID = pa.schema({"said": pa.string()})


class Writes:
    """Fails on the shard that it is told to fail on, or at once."""

    def __init__(self, broken: bool = False):
        if broken:
            raise RuntimeError("no engine\nhead size 16 is not supported")

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        if options["bad"]:
            raise OSError(f"{inputs[0]} is gone")
        write_rows(Path(output), [{"said": "done"}], SAID)


def shards(root: Path, bad: int | None = None) -> list[Shard]:
    return [Shard(Stage("a", {}), (f"in-{i}",), root / "a" / f"{i}.parquet", {"bad": i == bad}, rows=i + 1) for i in range(3)]


def test_every_shard_once_and_its_share(local_ray: None, tmp_path: Path) -> None:
    work = shards(tmp_path)
    work[0].output.parent.mkdir()
    write_rows(work[0].output, [{"said": "before"}], SAID)
    told = map_shards(Run(tmp_path), work, Writes, {}, Pool(), {})["a"]
    assert told["share"] == 1.0 and 0 < told["work"] < 1
    assert [pq.read_table(shard.output)["said"].to_pylist() for shard in work] == [["before"], ["done"], ["done"]]


def test_rows_of_an_unfinished_shard_count_as_far_as_it_tells(tmp_path: Path) -> None:
    *_, shard = shards(tmp_path)
    shard.output.parent.mkdir()
    tally = Tally(shard.output)
    assert _made([shard]) == 0
    tally(1)
    assert _made([shard]) == 0, "once a second is enough"
    tally.said -= 2
    tally(2)
    assert _made([shard]) == 2
    shard.output.write_text("done")
    assert _made([shard]) == shard.rows == 3


class Elsewhere:
    """Writes on a node whose files reach this one late, or never."""

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        Path(output).with_suffix(".elsewhere").write_text("done")


@pytest.mark.parametrize("late", [True, False])
def test_a_shard_that_another_node_wrote_is_waited_for(
    late: bool, local_ray: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_of, "SEEN_SECONDS", 30.0 if late else 1.0)
    work = [Shard(Stage("a", {}), (), tmp_path / "a" / f"{late}.parquet", {}, rows=1)]

    def arrive() -> None:
        while "not seen on this node yet" not in caplog.text:
            time.sleep(0.1)
        work[0].output.with_suffix(".elsewhere").rename(work[0].output)

    if late:
        threading.Thread(target=arrive, daemon=True).start()
    with contextlib.nullcontext() if late else pytest.raises(StageError, match=r"False\.parquet was not written"):
        map_shards(Run(tmp_path), work, Elsewhere, {}, Pool(), {})
    assert work[0].output.exists() == late and "1 shards are written and not seen on this node yet" in caplog.text


class Dies:
    """With its process, the first time."""

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        if not Path(inputs[0]).exists():
            Path(inputs[0]).touch()
            os._exit(1)
        Path(output).write_text("done")


def test_restarts_of_actors_are_counted(local_ray: None, tmp_path: Path) -> None:
    stage = Stage("a", {})
    told: list[Mapping[str, float]] = []

    class Asks(Display):
        def follow(self, total: int | None, unit: str, done: Callable[[], int], also: Callable[[], Mapping[str, float]] = dict) -> None:
            told.append(also())

    work = [Shard(stage, (str(tmp_path / "died"),), tmp_path / "a" / "0.parquet", {}, rows=1)]
    map_shards(Run(tmp_path, Asks()), work, Dies, {}, Pool(), {})
    assert work[0].output.read_text() == "done" and restarts(tmp_path / "a") == 1 and told == [{"restarts": 0}]


def test_actors_have_the_name_of_what_they_do() -> None:
    made = named("SampleShards", "quickstart")
    assert made.__name__ == "SampleShards: quickstart" and issubclass(made, Adapter)


@pytest.mark.parametrize(
    ("bad", "arguments", "said"), [(1, {}, "OSError: in-1 is gone"), (None, {"broken": True}, "head size 16 is not supported")]
)
def test_a_failing_actor_is_one_line_and_the_log_has_the_rest(
    bad: int | None, arguments: dict[str, Any], said: str, local_ray: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pipelines.workers.shards"), pytest.raises(StageError) as caught:
        map_shards(Run(tmp_path), shards(tmp_path, bad), Writes, arguments, Pool(), {})
    assert "\n" not in str(caught.value) and str(caught.value).startswith("a: an actor failed: ") and said in str(caught.value)
    assert "Traceback" in caplog.text


def test_a_worker_that_was_killed_for_memory_is_told_as_that() -> None:
    said = (
        "6 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.2, ID: 3e3e) was 22.38GB used / "
        "23.54GB limit (0.950692)\nOOM kill reason: Memory usage 24035762176B exceeded threshold\nRefer to the documentation on how to"
    )
    told = shards_of.last_words(RuntimeError(said))
    assert told.startswith("killed, as its machine ran out of memory (22.38GB of 23.54GB in use)")


def test_nothing_held_out_to_sample_is_said(tmp_path: Path) -> None:
    run, demonstrations, base = Run(tmp_path), Stage("demonstrations", {}), Stage("base/model", {})
    run.directory(demonstrations).mkdir(parents=True)
    stage = generation.plan("base/samples", base, base, demonstrations, Sampling(), Engine(), 0, {"held_out": None})
    with pytest.raises(StageError, match=r"base/samples: no row was held out: raise demonstrations\.held_out_fraction"):
        generation._tasks(run, stage, "policy")
