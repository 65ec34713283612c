"""SFT, GSIL and reward training: parquet in, a model out. Ray Train gangs the workers, each runs `actors.learner.entry`.

INPUT  demonstrations/train (SFT), iteration-1/pairs/train (GSIL) or rewards/init-sft/pairs/train (reward model)
OUTPUT policy/ or reward/ (Hugging Face directory; with LoRA also adapter/), metrics.jsonl, TensorBoard events,
       held_out.{json,parquet}, checkpoints/
"""

import concurrent.futures
import json
import logging
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from actors.allocator import TRAINING
from actors.learner.deepspeed_config import deepspeed_config, read_deepspeed
from actors.settings import Objective, Tracking, Training
from pipelines import base_model
from pipelines.artifacts import Run, Stage, StageError
from pipelines.records import shards
from pipelines.shards import last_words

log = logging.getLogger(__name__)


def plan(name: str, start: Stage, base: Stage, data: Stage, training: Training, objective: Objective, centre: Stage | None = None) -> Stage:
    """A stage that trains a policy, or a reward model.

    Args:
        name: of the stage.
        start: the policy whose weights it starts from.
        base: where the tokenizer is.
        data: demonstrations (SFT) or pairs.
        training: settings.
        objective: what it minimises.
        centre: makes it a reward model: samples over whose held-out part the mean and the standard deviation of the reward are taken.
    """
    steps = training.identity()
    if training.deepspeed:
        # What the file says is part of the stage; a contradiction stops here, before anything runs.
        try:
            steps["deepspeed"] = read_deepspeed(training.deepspeed)
            deepspeed_config(training, training.workers, steps["deepspeed"])
        except ValueError as error:
            raise StageError(str(error)) from None
    settings = {"training": steps, "objective": objective.identity()}
    inputs = {"start": start, "base": base, "data": data} | ({"centre": centre} if centre else {})
    return Stage(name, settings, inputs, demand=training.demand(), version=3)


def train(training: Training, objective: Objective, tracking: Tracking, longest: int, trust_remote_code: bool) -> Any:
    """Returns the work of a training stage.

    Args:
        training: settings.
        objective: what it minimises.
        tracking: where metrics go.
        longest: no prompt with one of its responses is longer, tokens.
        trust_remote_code: run Python code that comes with the model.
    """

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        stage = stages[0]
        directory = run.directory(stage)
        job = job_of(run, stage, training, objective, tracking, longest, trust_remote_code)
        metrics, failed = directory / "metrics.jsonl", directory / "failed"
        shutil.rmtree(failed, ignore_errors=True)
        run.display.follow(steps(job), "steps", lambda: count_lines(metrics))
        try:
            _fit(run, job, training)
        finally:
            for failure in sorted(failed.glob("*.json")):
                raise StageError(f"{job['name']}: {json.loads(failure.read_text())['error']}")
        return {stage.name: numbers(directory)}

    return work


def job_of(
    run: Run, stage: Stage, training: Training, objective: Objective, tracking: Tracking, longest: int, trust_remote_code: bool
) -> dict[str, Any]:
    """What the workers of a stage are told, see `actors.learner.worker.TrainJob`; the arguments are those of `train`."""
    data = {split: _filled(run.directory(stage.inputs["data"]) / split) for split in ("train", "held_out")}
    if objective.name == "sft":
        # Held-out answers tell about SFT; held-out pairs exist only later.
        data["held_out"] = []
    job = {
        "name": f"{run.root.name}/{stage.name}",
        "weights": base_model.weights(run, stage.inputs["start"]),
        "tokenizer": base_model.tokenizer(run, stage.inputs["base"]),
        "train": data["train"],
        "held_out": data["held_out"],
        "output": str(run.directory(stage)),
        "training": training,
        "objective": objective,
        "tracking": tracking,
        "deepspeed": stage.settings["training"]["deepspeed"],
        "longest": longest,
        "trust_remote_code": trust_remote_code,
    }
    if "centre" in stage.inputs:
        job |= {"kind": "reward", "centre": _filled(run.directory(stage.inputs["centre"]) / "held_out")}
    return job


def steps(job: dict[str, Any]) -> int:
    """That a training stage will take."""
    rows = sum(pq.read_metadata(path).num_rows for path in job["train"])
    return math.ceil(rows / job["training"].batch_size) * job["training"].epochs


def count_lines(path: Path) -> int:
    """Lines written so far; 0 before the file is there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _filled(folder: Path) -> list[str]:
    return [str(path) for path in shards(folder) if pq.read_metadata(path).num_rows]


def _fit(run: Run, job: dict[str, Any], training: Training) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from actors.learner.entry import run as worker

    gpu = training.gpus_per_worker > 0
    threads = max(1, int(training.cpus_per_worker))
    env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"} | TRAINING[training.precision]
    if not gpu:
        # Ray hides no GPU from a worker that asked for none, and DeepSpeed takes what it sees.
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    trainer = TorchTrainer(
        worker,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=training.workers if training.min_workers is None else (training.min_workers, training.workers),
            use_gpu=gpu,
            resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": training.gpus_per_worker} if gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=job["name"].replace("/", "-"),
            storage_path=str(run.root / "logs" / "ray_train"),
            failure_config=ray.train.FailureConfig(max_failures=training.max_failures),
            worker_runtime_env={"env_vars": env},
        ),
    )
    try:
        _fit_aside(trainer)
    except ray.train.TrainingFailedError as error:
        causes = getattr(error, "worker_failures", None) or {}
        first = next(iter(causes.values()), error)
        log.info("%s", first)
        raise StageError(f"{job['name']}: a training worker failed: {last_words(first)} (logs/job.log has all of it)") from error


def _fit_aside(trainer: Any) -> None:
    """Runs `trainer.fit` in a thread: in the main one it takes over Ctrl-C, and keeps it after it is done."""
    done: concurrent.futures.Future[None] = concurrent.futures.Future()

    def fit() -> None:
        try:
            done.set_result(trainer.fit())
        except BaseException as error:  # noqa: BLE001
            done.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    done.result()


def numbers(directory: Path) -> dict[str, Any]:
    """The last step's metrics, the tail's mean reward of real responses, and the held-out scores."""
    taken = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    tail = [step for step in taken[-max(1, len(taken) // 4) :] if "skipped" not in step]
    found: dict[str, Any] = {"steps": len(taken), "skipped": sum("skipped" in step for step in taken), "last": taken[-1]}
    if "reward_real" in taken[-1] and tail:
        found["tail_reward_real"] = sum(step["reward_real"] for step in tail) / len(tail)
    held_out = directory / "held_out.json"
    return found | ({"held_out": json.loads(held_out.read_text())} if held_out.exists() else {})
