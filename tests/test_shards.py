"""The pool of actors: what a person reads when an actor fails, and what stays."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from actors.settings import Engine, Pool, Sampling
from pipelines import generation
from pipelines.artifacts import Run, Stage, StageError
from pipelines.shards import Shard, Tally, _made, map_shards

# Ray's workers cannot import a test: the class travels with the task.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Writes:
    """Fails on the shard that it is told to fail on, or at once."""

    def __init__(self, broken: bool = False):
        if broken:
            raise RuntimeError("no engine\nhead size 16 is not supported")

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        if options["bad"]:
            raise OSError(f"{inputs[0]} is gone")
        Path(output).write_text("done")


def shards(root: Path, bad: int | None = None) -> list[Shard]:
    return [Shard(Stage("a", {}), (f"in-{i}",), root / "a" / f"{i}.parquet", {"bad": i == bad}, rows=i + 1) for i in range(3)]


def test_every_shard_once_and_its_share(local_ray: None, tmp_path: Path) -> None:
    work = shards(tmp_path)
    work[0].output.parent.mkdir()
    work[0].output.write_text("before")
    assert map_shards(Run(tmp_path), work, Writes, {}, Pool(), {}) == {"a": {"share": 1.0}}
    assert [shard.output.read_text() for shard in work] == ["before", "done", "done"]


def test_rows_of_an_unfinished_shard_count_as_far_as_it_tells(tmp_path: Path) -> None:
    *_, shard = shards(tmp_path)
    shard.output.parent.mkdir()
    tally = Tally(shard.output)
    assert _made(shard) == 0
    tally(1)
    assert _made(shard) == 0, "once a second is enough"
    tally.said -= 2
    tally(2)
    assert _made(shard) == 2
    shard.output.write_text("done")
    assert _made(shard) == shard.rows == 3


@pytest.mark.parametrize(
    ("bad", "arguments", "said"), [(1, {}, "OSError: in-1 is gone"), (None, {"broken": True}, "head size 16 is not supported")]
)
def test_a_failing_actor_is_one_line_and_the_log_has_the_rest(
    bad: int | None, arguments: dict[str, Any], said: str, local_ray: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pipelines.shards"), pytest.raises(StageError) as caught:
        map_shards(Run(tmp_path), shards(tmp_path, bad), Writes, arguments, Pool(), {})
    assert "\n" not in str(caught.value) and str(caught.value).startswith("a: an actor failed: ") and said in str(caught.value)
    assert "Traceback" in caplog.text


def test_nothing_held_out_to_sample_is_said(tmp_path: Path) -> None:
    run, demonstrations, base = Run(tmp_path), Stage("demonstrations", {}), Stage("base/model", {})
    run.directory(demonstrations).mkdir(parents=True)
    stage = generation.plan("base/samples", base, base, demonstrations, Sampling(), Engine(), 0, {"held_out": None})
    with pytest.raises(StageError, match=r"base/samples: no row was held out: raise demonstrations\.held_out_fraction"):
        generation._tasks(run, stage, "policy")
