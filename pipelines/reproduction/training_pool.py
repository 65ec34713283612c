"""Many trainings of small models at once: a pool of actors, each of them a worker of its own, trains one stage after the other.

The same `actors.learner.worker.train` as under Ray Train, which gangs workers: for a model that trains in seconds,
most of the time would be theirs. A stage whose losses stay infinite keeps a `diverged.json` instead of a policy and stops nobody.

INPUT  as in policy_training.py
OUTPUT the same, and done.json: {"diverged": why or null}, written last
"""

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from actors.allocator import environment
from actors.settings import Objective, Pool, Tracking, Training
from pipelines.policy_training import job_of, newest, numbers, steps
from pipelines.run.artifacts import Run, Stage, Work, write_json
from pipelines.workers.shards import Shard, map_shards

DONE = "done.json"
Settled = Callable[[Run, Stage], tuple[Training, Objective]]
"""The settings of a stage, also of one that takes them from the numbers of another."""


def train(pool: Pool, settled: Settled, longest: int) -> Work:
    """Returns the work of training stages that do not wait for each other.

    Args:
        pool: the actors; a stage trains on one of them.
        settled: says what each stage trains with.
        longest: no prompt with one of its responses is longer, tokens.
    """

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        tasks, chosen = [], {}
        for stage in stages:
            training, objective = settled(run, stage)
            chosen[stage.name] = {"learning_rate": training.learning_rate, "beta": objective.beta, "gamma": objective.gamma}
            job = job_of(run, stage, training, objective, Tracking(tensorboard=False), longest, False)
            plain = job | {name: job[name].model_dump() for name in ("training", "objective", "tracking")}
            output = run.directory(stage) / DONE
            tasks.append(Shard(stage, tuple(job["train"]), output, {"job": json.dumps(plain)}, steps(job)))
        # Long trainings first: two workers then end at about the same time.
        tasks.sort(key=lambda task: -task.rows)
        env = environment(stages[0].settings["training"]["precision"], pool.num_cpus, pool.num_gpus)
        found = map_shards(run, tasks, TrainStages, {"threads": max(1, int(pool.num_cpus))}, pool, env, waiting=1)
        for stage in stages:
            done = json.loads((run.directory(stage) / DONE).read_text())
            found[stage.name] |= done | {"chosen": chosen[stage.name]} | ({} if done["diverged"] else numbers(run.directory(stage)))
        return found

    return work


class TrainStages:
    """The actor: a process group of one, and whatever DeepSpeed keeps between two engines.

    Args:
        threads: of torch.
    """

    def __init__(self, threads: int):
        import deepspeed  # noqa: F401
        import torch

        from actors.learner import worker

        self.worker = worker
        # DeepSpeed asks its launcher's variables for what the process group says too.
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        torch.set_num_threads(threads)
        meeting = tempfile.NamedTemporaryFile(delete=False)  # noqa: SIM115
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting.name}", rank=0, world_size=1)

    def __call__(self, inputs: list[str], output: str, options: Mapping[str, Any], tell: Callable[[int], None]) -> None:
        """Trains one stage; see the head of this file."""
        job = json.loads(options["job"])
        with _told(Path(job["output"]) / "metrics.jsonl", tell):
            diverged = self._train(job)
        write_json(Path(output), {"diverged": diverged})

    def _train(self, job: Mapping[str, Any]) -> str | None:
        """Trains; returns why it was given up, if it was."""
        kinds = {"training": Training, "objective": Objective, "tracking": Tracking}
        try:
            self.worker.train(self.worker.TrainJob(**(dict(job) | {name: kind(**job[name]) for name, kind in kinds.items()})))
        except self.worker.TrainingError as error:
            return str(error)
        return None


@contextlib.contextmanager
def _told(metrics: Path, tell: Callable[[int], None]) -> Iterator[None]:
    """Tells the steps of the training inside the block: the worker writes a line for each."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(2.0):
            tell(int(newest(metrics).get("step", 0)))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
