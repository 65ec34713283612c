"""A gang of training workers under Ray Train, which trains models one after the other and waits in between.

Gang.train(jobs) --Orders--> every worker: `actors.learner.entry.run` --> trained.json of each
"""

import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from actors.allocator import environment
from actors.learner.entry import run as worker
from actors.learner.entry import trained
from actors.notices import FOLDER, tell
from actors.orders import Orders, beside_the_driver
from actors.settings import Training
from actors.storage import advice, is_full
from pipelines.run.artifacts import Run, StageError
from pipelines.run.keeping import CLOSE_SECONDS, WAITS_FOR_ACTORS
from pipelines.run.restarts import restarted
from pipelines.workers.shards import last_words

log = logging.getLogger(__name__)
Job = dict[str, Any]


class GangOrders(Orders):
    """Lists of trainings, see `actors.learner.entry.run`, and what becomes of their workers.

    Args:
        notices: folder for what a person should read.
    """

    def __init__(self, notices: str) -> None:
        super().__init__()
        self.notices = notices
        self.behind = 0
        self.failures = 0

    async def begin(self) -> int:
        """The first order that is not done."""
        return self.behind

    async def reached(self, number: int) -> None:
        """The orders before this one are done."""
        async with self.changed:
            self.behind = number
            self.changed.notify_all()

    async def done(self, count: int) -> None:
        """Waits until so many are done."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.behind >= count)

    async def failed_so_far(self) -> int:
        """How often the gang had to be started again."""
        return self.failures

    async def failed(self, errors: Mapping[int, str]) -> None:
        """Workers that failed, by rank; Ray Train starts the gang again, as often as it may."""
        self.failures += 1
        if self.behind == len(self.given):
            # While it waited: nobody's work is lost, and it waits no longer.
            return
        job = under_way(self.given[self.behind])
        restarted(Path(job["output"]))
        for rank, error in errors.items():
            tell(f"{job['name']}: training worker {rank} failed: {error}", self.notices)


class Gang:
    """Starts the workers, which then wait.

    Args:
        run: the run.
        training: how many workers, and what each asks Ray for.
    """

    def __init__(self, run: Run, training: Training):
        notices = str(run.notices.absolute())
        self.orders = beside_the_driver(GangOrders, notices)
        self.given = 0
        self.spare = training.max_failures
        self.trainer = partial(_trainer, self.orders, run, training, notices)
        self._start()

    def _start(self) -> None:
        self.over: concurrent.futures.Future[None] = concurrent.futures.Future()
        # In the main thread Ray Train takes over Ctrl-C, and keeps it.
        threading.Thread(target=self._fit, name=WAITS_FOR_ACTORS, daemon=True).start()

    def _fit(self) -> None:
        try:
            self.over.set_result(self.trainer().fit())
        except BaseException as error:  # noqa: BLE001
            self.over.set_exception(error)

    def train(self, jobs: list[Job], hurt: Callable[[], None]) -> None:
        """Returns when all are done, or when one is not and has left in `failed/` why.

        Args:
            jobs: arguments of `actors.learner.worker.TrainJob`.
            hurt: called when workers have died and will be started again, for which there has to be room.

        Raises:
            StageError: workers died too often.
        """
        import ray

        ray.get(self.orders.give.remote(jobs))
        self.given += 1
        done = self.orders.done.remote(self.given)
        told = False
        while True:
            if ray.wait([done], timeout=0.5)[0]:
                ray.get(done)
                return
            if self.over.done() and not self._again(under_way(jobs)):
                break
            if not told and ray.get(self.orders.failed_so_far.remote()):
                told = True
                hurt()
        error = self.over.exception()
        _give_back(error)
        if isinstance(error, ray.train.TrainingFailedError):
            raise _told(error, under_way(jobs)) from error
        if error:
            raise error

    def _again(self, job: Job) -> bool:
        """Starts the workers again where an actor of Ray Train's own has died, its controller say, as Linux and Ray end them where memory
        is short: of a worker's death Ray Train takes care, at its own it gives up. At most `max_failures` times, counted apart.
        """
        import ray

        error = self.over.exception()
        lost = error.controller_failure if isinstance(error, ray.train.ControllerError) else error
        if not self.spare or not isinstance(lost, ray.exceptions.RayActorError):
            return False
        self.spare -= 1
        log.warning("%s: an actor of Ray Train died, and its workers with it: they start again (%s)", job["name"], last_words(lost))
        ray.get(self.orders.failed.remote({}))
        _give_back(error)
        self._start()
        return True

    def alive(self) -> bool:
        """Whether all workers live that it was started with."""
        import ray

        try:
            return not self.over.done() and not ray.get(self.orders.failed_so_far.remote())
        except ray.exceptions.RayError:
            return False

    def close(self) -> None:
        """Ends the workers, which wait."""
        import ray

        self.orders.end.remote()
        with contextlib.suppress(Exception):
            _give_back(self.over.exception(timeout=CLOSE_SECONDS))
        ray.kill(self.orders)


def _give_back(error: BaseException | None) -> None:
    """Frees what Ray Train's controller held, if a training ended with its death: the placement group outlives it."""
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Group
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    if not isinstance(error, ray.exceptions.RayActorError) or not error.actor_id:
        return
    # One that only could not be reached may live, and its workers write.
    ray._private.worker.global_worker.core_worker.kill_actor(ray.ActorID.from_hex(error.actor_id), True)
    until = time.monotonic() + CLOSE_SECONDS
    while (state.actor_table(error.actor_id) or {}).get("State") != "DEAD" and time.monotonic() < until:
        time.sleep(0.1)
    for written in state._connect_and_get_accessor().get_placement_group_table():
        group = Group.FromString(written)
        if group.creator_actor_id.hex() == error.actor_id and group.state != Group.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def under_way(jobs: list[Job]) -> Job:
    """The first of some trainings that is not done."""
    return next((job for job in jobs if trained(job["output"]) is None), jobs[-1])


def _told(error: Any, job: Job) -> StageError:
    """What a person is told of workers that died too often."""
    first = next(iter((getattr(error, "worker_failures", None) or {}).values()), error)
    log.info("%s", first)
    output = Path(job["output"])
    who = "a training worker" if getattr(error, "worker_failures", None) else "Ray Train"
    said = f"{who} failed: {last_words(first)} (logs/job.log has all of it)"
    return StageError(f"{job['name']}: {advice(output, first) if is_full(output, first) else said}")


def _trainer(orders: Any, run: Run, training: Training, notices: str) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):
        """Without Ray Train's cleaner of placement groups (`_give_back` is ours): that asks the dashboard whether the controller lives.
        A local instance has none, and whatever else listens at 127.0.0.1:8265, the dashboard of another Ray say, knows no such controller:
        the cleaner would then kill the workers in mid-training."""

        def _create_default_callbacks(self) -> list[Any]:
            return [each for each in super()._create_default_callbacks() if not isinstance(each, PlacementGroupCleanerCallback)]

    class Tells(ray.train.UserCallback):
        """Notes failures; Ray Train's controller, where this runs, must not wait."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            orders.failed.remote({rank: last_words(error) for rank, error in worker_exceptions.items()})

    gpu = training.gpus_per_worker > 0
    env = environment(training.precision, training.cpus_per_worker, training.gpus_per_worker) | {FOLDER: notices}
    return Trainer(
        worker,
        train_loop_config={"orders": orders},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=training.workers if training.min_workers is None else (training.min_workers, training.workers),
            use_gpu=gpu,
            resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": training.gpus_per_worker} if gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            # In Ray's dashboard.
            name=f"{run.root.name}-training".replace("/", "-"),
            storage_path=str(run.root / "logs" / "ray_train"),
            failure_config=ray.train.FailureConfig(max_failures=training.max_failures),
            worker_runtime_env={"env_vars": env},
            callbacks=[Tells()],
        ),
    )
