"""A training stage under real Ray Train: a killed worker, fewer workers than wanted, rows that spoil everything."""

import json
import math
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from ray.exceptions import RayActorError
from ray.train import ControllerError
from running import when
from stages import planned, run_stage
from training import assert_same_steps, steps_of

from actors.settings import Objective, Tracking
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


def test_a_users_deepspeed_json_is_part_of_the_stage(local_ray: None, tiny: Path, tmp_path: Path) -> None:
    path, marks = tmp_path / "ds.json", []
    for text in ('{"wall_clock_breakdown": true}', '{"wall_clock_breakdown": false}'):
        path.write_text(text)
        run, training, (stage,) = planned(tmp_path / "run", tiny, [None], deepspeed=str(path))
        marks.append(stage.fingerprint)
        job = policy_training.job_of(run, stage, training, Objective(), Tracking(), 64, False)
        assert job["deepspeed"] == json.loads(text) and job["training"].deepspeed == str(path)
    assert marks[0] != marks[1]
    path.write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(StageError, match=r"ds.json says zero_optimization.stage=3, the config says zero_stage=2 \(make them agree\)"):
        planned(tmp_path / "run", tiny, [None], deepspeed=str(path))


@pytest.mark.slow
def test_deepspeed_itself_gets_a_users_json(local_ray: None, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"reduce_bucket_size": "many"}}')
    with pytest.raises(StageError, match="reduce_bucket_size"):
        run_stage(tmp_path / "run", tiny, workers=1, deepspeed=str(tmp_path / "ds.json"))


def test_the_numbers_of_a_stage_by_hand(tmp_path: Path) -> None:
    rewards = [9.0, -1.0, -2.0, None, -3.0]
    taken = [{"step": n, "reward_real": value} if value else {"step": n, "skipped": 1} for n, value in enumerate(rewards, start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in taken))
    found = policy_training.numbers(tmp_path)
    # The last three, of which one was skipped: -2 and -3, a deviation of sqrt(1 / 2) over sqrt(2).
    assert (found["steps"], found["skipped"], found["last"]) == (5, 1, {"step": 5, "reward_real": -3.0})
    assert (found["tail_reward_real"], found["tail_reward_real_stderr"]) == pytest.approx((-2.5, 0.5)) and "held_out" not in found
    # Of 40 steps the last ten.
    taken = [{"step": n, "reward_real": 5.0 if n <= 30 else -1.0} for n in range(1, 41)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in taken))
    (tmp_path / "held_out.json").write_text('{"rows": 8, "accuracy": 0.75}')
    found = policy_training.numbers(tmp_path)
    assert (found["tail_reward_real"], found["tail_reward_real_stderr"]) == (-1.0, 0.0)
    assert found["held_out"] == {"rows": 8, "accuracy": 0.75}


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


class NoActors(BaseHTTPRequestHandler):
    """A dashboard that knows no actor."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        nothing = {"total": 0, "num_after_truncation": 0, "num_filtered": 0, "result": [], "partial_failure_warning": "", "warnings": None}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"result": True, "msg": "", "data": {"result": nothing}}).encode())


@pytest.mark.slow
def test_whatever_listens_where_a_dashboard_would_ends_no_worker(undisturbed: Any, local_ray: None, tiny: Path, tmp_path: Path) -> None:
    try:
        server = HTTPServer(("127.0.0.1", 8265), NoActors, bind_and_activate=False)
        server.allow_reuse_address = True
        server.server_bind()
    except OSError:
        pytest.skip("somebody listens at port 8265")
    with server:

        def listen() -> None:
            server.server_activate()
            threading.Thread(target=server.serve_forever, daemon=True).start()

        # In mid-training: Ray Train's cleaner looks from the start on, and gives up where it is answered so before it knows of workers.
        watcher = when((tmp_path / "gsil/training/metrics.jsonl").exists, listen)
        stage = run_stage(tmp_path, tiny, workers=2, epochs=40, checkpoint_every=0)
        watcher.join()
        server.shutdown()
    assert restarts(stage) == 0 and NoActors.asked == [] and len(steps_of(stage)) > len(undisturbed)


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
