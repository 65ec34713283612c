"""A training stage under real Ray Train: a killed worker, fewer workers than wanted, rows that spoil everything."""

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.exceptions import RayActorError
from ray.train import ControllerError
from running import when
from stages import planned, run_stage
from training import assert_same_steps, steps_of

from actors.settings import Tracking
from pipelines import policy_training
from pipelines.run.artifacts import StageError
from pipelines.run.keeping import Keeper
from pipelines.run.restarts import restarts
from pipelines.workers import gang


@pytest.fixture(scope="module")
def waited(local_ray: None, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, float]]]:
    """Steps of two stages on the same data, whose workers all lived: those of the first waited for the second."""
    run, training, stages = planned(tmp_path_factory.mktemp("undisturbed"), tiny, [None, None], workers=2)
    run.keeper = Keeper(60)
    for stage in stages:
        run.do(policy_training.train(training, Tracking(), 64, False), stage)
    assert len(run.keeper.kept) == 1
    run.keeper.close()
    return [steps_of(run.directory(stage)) for stage in stages]


@pytest.fixture(scope="module")
def undisturbed(waited: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Steps of a stage whose workers all lived."""
    return waited[0]


def test_workers_that_waited_train_as_new_ones_do(waited: list[list[dict[str, float]]]) -> None:
    assert_same_steps(waited[1], waited[0], rel=1e-6)


def actors(kind: str = "RayTrainWorker") -> list[int]:
    """Processes of Ray Train that are there."""
    return [p.pid for p in psutil.Process().children(recursive=True) if f"ray::{kind}" in " ".join(p.cmdline())]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["RayTrainWorker", "TrainController"])
def test_one_that_dies_while_it_waits_costs_nothing_but_the_start_of_another_gang(
    kind: str, undisturbed: Any, local_ray: None, tiny: Path, tmp_path: Path
) -> None:
    run, training, stages = planned(tmp_path, tiny, [None, None], workers=2)
    run.keeper = Keeper(60)
    run.do(policy_training.train(training, Tracking(), 64, False), stages[0])
    before = set(actors())
    os.kill(min(actors(kind)), signal.SIGKILL)
    time.sleep(5)
    run.do(policy_training.train(training, Tracking(), 64, False), stages[1])
    assert_same_steps(steps_of(run.directory(stages[1])), undisturbed, rel=4e-3)
    assert not before & set(actors()) and restarts(run.directory(stages[1])) == 0
    run.keeper.close()


@pytest.mark.slow
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint_only(
    undisturbed: Any, local_ray: None, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed: list[int] = []

    def kill() -> None:
        killed.append(actors()[0])
        os.kill(killed[0], signal.SIGKILL)

    watcher = when((tmp_path / "gsil/training/checkpoints/step-000010/done.json").exists, kill)
    stage = run_stage(tmp_path, tiny, workers=2)
    watcher.join()
    assert killed and not psutil.pid_exists(killed[0])
    assert_same_steps(steps_of(stage), undisturbed, rel=4e-3)
    assert caplog.text.count("training goes on behind step") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "starts_again"), [("TrainController", True), ("SynchronizationActor", False)])
def test_so_does_an_actor_of_ray_train_itself(
    kind: str, starts_again: bool, undisturbed: Any, local_ray: None, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Ray's memory monitor or Linux may end them; Ray Train starts none of them again, and workers need not all of them."""
    killed: list[int] = []

    def kill() -> None:
        (process,) = actors(kind)
        killed.append(process)
        os.kill(process, signal.SIGKILL)

    watcher = when((tmp_path / "gsil/training/checkpoints/step-000010/done.json").exists, kill)
    stage = run_stage(tmp_path, tiny, workers=2)
    watcher.join()
    assert killed and not psutil.pid_exists(killed[0])
    assert_same_steps(steps_of(stage), undisturbed, rel=4e-3)
    assert caplog.text.count("an actor of Ray Train died") == caplog.text.count("training goes on behind step") == starts_again


@pytest.mark.slow
def test_what_ray_train_does_not_try_again_is_tried_as_often_as_workers_may_die(
    undisturbed: Any, local_ray: None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, deaths = gang._trainer, [RayActorError(), RayActorError()]

    class Dies:
        """A trainer whose controller meets the death of one of its actors."""

        def fit(self) -> None:
            raise ControllerError(deaths.pop())

    monkeypatch.setattr(gang, "_trainer", lambda *arguments: Dies() if deaths else real(*arguments))
    with pytest.raises(StageError, match=r"gsil/training: Ray Train failed: .*\(logs/job.log has all of it\)"):
        run_stage(tmp_path / "once", tiny, workers=2, max_failures=0)
    assert len(deaths) == 1
    assert_same_steps(steps_of(run_stage(tmp_path / "twice", tiny, workers=2, max_failures=1)), undisturbed, rel=4e-3)


@pytest.mark.slow
def test_with_too_few_free_places_it_trains_with_fewer_workers(undisturbed: Any, local_ray: None, tiny: Path, tmp_path: Path) -> None:
    stage = run_stage(tmp_path, tiny, workers=4, min_workers=1)
    assert_same_steps(steps_of(stage), undisturbed, rel=4e-3)


@pytest.mark.slow
def test_rows_that_are_not_finite_fail_the_stage_once_with_their_ids(local_ray: None, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"gsil/training: the loss .* not finite in 3 steps in a row, up to step 3, on the rows row-"):
        run_stage(tmp_path, tiny, dict.fromkeys(range(14), math.inf), workers=1)


@pytest.mark.slow
def test_one_gang_trains_several_and_what_one_learned_outlives_another_that_fails(local_ray: None, tiny: Path, tmp_path: Path) -> None:
    run, training, stages = planned(
        tmp_path, tiny, [None, dict.fromkeys(range(14), math.inf), None], workers=2, epochs=2, checkpoint_every=0
    )
    with pytest.raises(StageError, match=r"gsil-1/training: the loss .* not finite"):
        run.do(policy_training.train(training, Tracking(), 64, False), *stages)
    before = steps_of(run.directory(stages[0]))
    assert not (run.directory(stages[2]) / "metrics.jsonl").exists()
    run.do(policy_training.train(training, Tracking(), 64, False), stages[0], stages[2])
    # They carry tokens per second: taken again they would differ.
    assert steps_of(run.directory(stages[0])) == before
    assert_same_steps(steps_of(run.directory(stages[2])), before, rel=4e-3)
    assert sum(stage["seconds"] for stage in run.log if "training" in stage["name"]) > 0
