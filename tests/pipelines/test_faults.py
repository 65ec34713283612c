"""Actors and nodes that die, and one that joins late, on a Ray cluster of several raylets: the rows are those of a run that nobody
disturbed, and the job's log says what happened."""

import hashlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from ray import cloudpickle
from running import rows_of, wait_until_gone, when
from stages import run_stage
from training import assert_same_steps, steps_of

from actors.settings import Pool
from pipelines.records import intact, write_rows
from pipelines.run.artifacts import Run, Stage
from pipelines.run.keeping import Keeper
from pipelines.settings import RaySettings
from pipelines.workers import cluster as clusters
from pipelines.workers.shards import Shard, map_shards

# Ray's workers cannot import a test: the class travels with the task.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
SAID = pa.schema({"id": pa.string(), "text": pa.string(), "by": pa.int64()})
ROWS = 12
GENERATION = Stage("generation", {})


class Slow:
    """An engine of about a tenth of a second a row; what it says depends on nothing but the row."""

    def change(self, options: dict[str, Any]) -> None:
        """Holds nothing."""

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        rows = []
        while options["gate"] and not Path(options["gate"]).exists():
            time.sleep(0.05)
        for number in range(ROWS):
            time.sleep(options["pause"])
            row = f"{options['shard']}-{number}"
            rows.append({"id": row, "text": hashlib.sha256(row.encode()).hexdigest(), "by": os.getpid()})
            tell(len(rows))
        write_rows(Path(output), rows, SAID)


def generate(
    root: Path, shards: int, actors: int, least: int = 1, pause: float = 0.12, gate: str = "", seconds: float = 0
) -> tuple[list[dict[str, Any]], set[int]]:
    """Runs a stage of `shards` shards; returns its rows and who made them."""

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        outputs = [run.directory(stages[0]) / f"{number:05d}.parquet" for number in range(shards)]
        options = {"pause": pause, "gate": gate}
        tasks = [Shard(stages[0], (), output, options | {"shard": k}, ROWS) for k, output in enumerate(outputs)]
        return map_shards(run, tasks, Slow, {}, Pool(min_actors=least, max_actors=actors), {"GSIL_TEST": os.environ["GSIL_TEST"]})

    run = Run(root)
    run.keeper = Keeper(seconds)
    run.do(work, GENERATION)
    assert not run.keeper.kept, "after a death nobody waits"
    assert all(intact(path) for path in (root / "generation").glob("*.parquet"))
    assert not [path for path in (root / "generation").iterdir() if path.name.startswith(".")], "files of the dead stay behind"
    rows = rows_of(root / "generation")
    return [{key: value for key, value in row.items() if key != "by"} for row in rows], {row["by"] for row in rows}


def undisturbed(shards: int) -> list[dict[str, Any]]:
    """What a run makes that nobody stopped."""
    names = [f"{shard}-{number}" for shard in range(shards) for number in range(ROWS)]
    return [{"id": name, "text": hashlib.sha256(name.encode()).hexdigest()} for name in names]


def at_work(root: Path) -> list[int]:
    """Actors in the middle of a shard."""
    told = [path.read_text() for path in (root / "generation").glob(".*.rows")] if (root / "generation").exists() else []
    return [int(found[1]) for text in told if (found := re.match(r"[1-9]\d* process (\d+) ", text))]


@pytest.fixture(scope="module")
def several_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without CPUs and one node."""
    from ray.cluster_utils import Cluster

    mark = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GSIL_TEST", str(mark))
        patch.setattr(clusters, "LOOK_SECONDS", 0.5)
        health = {"health_check_period_ms": 500, "health_check_failure_threshold": 2, "health_check_timeout_ms": 500}
        # Nodes are added in threads, where no handlers of signals can be set.
        made = Cluster(shutdown_at_exit=False, initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": health})
        made.add_node(num_cpus=1)
        try:
            with clusters.connected(RaySettings(address=made.address)):
                yield made
        finally:
            made.shutdown()
    wait_until_gone(mark)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO):
        yield caplog


@pytest.mark.slow
def test_an_actor_killed_in_mid_shard_costs_that_shard_only(several_nodes: Any, tmp_path: Path, warned: pytest.LogCaptureFixture) -> None:
    killed: list[int] = []

    def kill() -> None:
        killed.extend(at_work(tmp_path))
        os.kill(killed[0], signal.SIGKILL)

    def second_shard() -> bool:
        return (tmp_path / "generation/00000.parquet").exists() and bool(at_work(tmp_path))

    watcher = when(second_shard, kill)
    rows, makers = generate(tmp_path, shards=3, actors=1)
    watcher.join()
    assert rows == undisturbed(3) and len(makers) == 2 and killed[0] in makers, "the first shard stays that of the dead actor"
    assert re.search(rf"0000\d\.parquet: made anew, process {killed[0]} on \S+ ended after \d+ rows of it", warned.text)
    assert not psutil.pid_exists(killed[0])


@pytest.mark.slow
def test_a_node_that_joins_late_is_used(several_nodes: Any, tmp_path: Path, warned: pytest.LogCaptureFixture) -> None:
    joined: list[Any] = []

    def begun() -> int:
        return len([*(tmp_path / "generation").glob(".*.rows")]) if (tmp_path / "generation").exists() else 0

    # The first shard waits for a second actor: Ray Data looks every 20 s for what the cluster has.
    watchers = [
        when(lambda: begun() == 1, lambda: joined.append(several_nodes.add_node(num_cpus=1))),
        when(lambda: begun() == 2, (tmp_path / "two").touch),
    ]
    rows, makers = generate(tmp_path, shards=4, actors=2, gate=str(tmp_path / "two"))
    for watcher in watchers:
        watcher.join()
    several_nodes.remove_node(joined[0])
    assert rows == undisturbed(4) and len(makers) == 2
    assert re.search(r"node \S+ \(\w+, 1 CPUs, 0 GPUs\) joined the cluster", warned.text)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 60], ids=["for one stage", "kept"])
def test_a_node_killed_during_generation_loses_nothing_and_doubles_nothing(
    several_nodes: Any, tmp_path: Path, warned: pytest.LogCaptureFixture, seconds: float
) -> None:
    doomed = several_nodes.add_node(num_cpus=1)
    several_nodes.wait_for_nodes()
    watcher = when(lambda: len(at_work(tmp_path)) == 2, lambda: several_nodes.remove_node(doomed, allow_graceful=False))
    rows, _ = generate(tmp_path, shards=4, actors=2, least=2, pause=0.3, seconds=seconds)
    watcher.join(timeout=10)
    assert not watcher.is_alive(), "the stage ended before its node was killed"
    assert rows == undisturbed(4)
    assert "made anew, process" in warned.text and re.search(r"node \S+ \(\w+, 1 CPUs, 0 GPUs\) is gone: what ran there", warned.text)


@pytest.mark.slow
def test_a_node_killed_during_training_costs_the_steps_since_the_last_checkpoint(
    several_nodes: Any, tiny: Path, tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    doomed = several_nodes.add_node(num_cpus=1)
    several_nodes.wait_for_nodes()
    undisturbed = steps_of(run_stage(tmp_path / "whole", tiny, workers=2))
    watcher = when(
        (tmp_path / "run/gsil/training/checkpoints/step-000010/done.json").exists,
        lambda: several_nodes.remove_node(doomed, allow_graceful=False),
    )
    stage = run_stage(tmp_path / "run", tiny, workers=2, min_workers=1)
    watcher.join()
    assert_same_steps(steps_of(stage), undisturbed, rel=4e-3)
    assert "is gone: what ran there" in warned.text and "training worker" in warned.text
    assert re.search(r"training goes on behind step \d+, with 1 worker\b", warned.text)
