"""SFT, GSIL and reward training: parquet in, a model out. Ray Train gangs the workers, each runs `actors.learner.entry`.

INPUT  demonstrations/train (SFT), iteration-1/pairs/train (GSIL) or rewards/init-sft/pairs/train (reward model)
OUTPUT policy/ or reward/ (Hugging Face directory; with LoRA also adapter/), metrics.jsonl, TensorBoard events,
       held_out.{json,parquet}, trained.json, checkpoints/
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
from actors.learner.entry import trained
from actors.notices import FOLDER, tell
from actors.settings import Objective, Tracking, Training
from actors.storage import advice, is_full
from pipelines import base_model
from pipelines.artifacts import Run, Stage, StageError
from pipelines.cluster import wait_for
from pipelines.records import shards
from pipelines.restarts import restarted, restarts
from pipelines.shards import last_words

log = logging.getLogger(__name__)
STEP_BYTES = 16384
"""A recorded step is shorter."""


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


def train(training: Training, tracking: Tracking, longest: int, trust_remote_code: bool) -> Any:
    """Returns the work of training stages: one gang of workers trains them one after the other.

    Args:
        training: where it runs; what is trained, and how, each stage says itself.
        tracking: where metrics go.
        longest: no prompt with one of its responses is longer, tokens.
        trust_remote_code: run Python code that comes with the model.
    """

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        jobs = [job_of(run, stage, *_settings(stage, training), tracking, longest, trust_remote_code) for stage in stages]
        places = {job["name"]: Path(job["output"]) for job in jobs}
        for place in places.values():
            shutil.rmtree(place / "failed", ignore_errors=True)

        def reached() -> list[dict[str, Any]]:
            return [newest(place / "metrics.jsonl") for place in places.values()]

        def now() -> dict[str, float]:
            rates = [step["tokens_per_second"] for step in reached() if "tokens_per_second" in step]
            return {"tokens_per_second": rates[-1] if rates else 0, "restarts": restarts(run.directory(stages[0]))}

        run.display.follow(sum(map(steps, jobs)), "steps", lambda: sum(int(step.get("step", 0)) for step in reached()), now)
        try:
            # What an earlier attempt trained to the end stays.
            if left := [job for job in jobs if trained(job["output"]) is None]:
                _fit(run, left, training, run.directory(stages[0]))
        finally:
            for name, place in places.items():
                for failure in sorted((place / "failed").glob("*.json")):
                    raise StageError(f"{name}: {json.loads(failure.read_text())['error']}")
        seconds = {stage.name: trained(str(run.directory(stage))) or 0.0 for stage in stages}
        shares = {name: {"share": own / sum(seconds.values())} for name, own in seconds.items()}
        return {stage.name: numbers(run.directory(stage)) | shares[stage.name] for stage in stages}

    return work


def _settings(stage: Stage, training: Training) -> tuple[Training, Objective]:
    """What a stage says of itself, at the place that `training` says."""
    own = {name: value for name, value in stage.settings["training"].items() if name != "deepspeed"}
    return training.model_copy(update=own), Objective(**stage.settings["objective"])


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


def newest(path: Path) -> dict[str, Any]:
    """The last step that was recorded; nothing before the first."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - STEP_BYTES))
        # What comes after the last line's end is being written.
        *_, last, _ = [b"", b"", *file.read().split(b"\n")]
    return json.loads(last) if last else {}


def _filled(folder: Path) -> list[str]:
    return [str(path) for path in shards(folder) if pq.read_metadata(path).num_rows]


def _fit(run: Run, jobs: list[dict[str, Any]], training: Training, directory: Path) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from actors.learner.entry import run as worker

    wait_for(run, jobs[0]["name"], training.min_workers or training.workers, training.cpus_per_worker, training.gpus_per_worker)
    gpu = training.gpus_per_worker > 0
    threads = max(1, int(training.cpus_per_worker))
    notices = str((run.root / "logs" / "notices").absolute())
    env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", FOLDER: notices} | TRAINING[training.precision]
    if not gpu:
        # Ray hides no GPU from a worker that asked for none, and DeepSpeed takes what it sees.
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    trainer = TorchTrainer(
        worker,
        train_loop_config={"jobs": jobs},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=training.workers if training.min_workers is None else (training.min_workers, training.workers),
            use_gpu=gpu,
            resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": training.gpus_per_worker} if gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=jobs[0]["name"].replace("/", "-"),
            storage_path=str(run.root / "logs" / "ray_train"),
            failure_config=ray.train.FailureConfig(max_failures=training.max_failures),
            worker_runtime_env={"env_vars": env},
            callbacks=[_tells_of_failures(jobs[0]["name"], directory, notices)],
        ),
    )
    try:
        _fit_aside(trainer)
    except ray.train.TrainingFailedError as error:
        causes = getattr(error, "worker_failures", None) or {}
        first = next(iter(causes.values()), error)
        log.info("%s", first)
        under_way = next((job for job in jobs if trained(job["output"]) is None), jobs[-1])
        output = Path(under_way["output"])
        said = f"a training worker failed: {last_words(first)} (logs/job.log has all of it)"
        raise StageError(f"{under_way['name']}: {advice(output, first) if is_full(output, first) else said}") from error


def _tells_of_failures(name: str, directory: Path, notices: str) -> Any:
    """What Ray Train's controller, which starts a gang again after a failure, says of it in the job's log and on its display."""
    import ray.train

    class Tells(ray.train.UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            restarted(directory)
            for rank, error in worker_exceptions.items():
                tell(f"{name}: training worker {rank} failed: {last_words(error)}", notices)

    return Tells()


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
    taken = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tail = [step for step in taken[-max(1, len(taken) // 4) :] if "skipped" not in step]
    found: dict[str, Any] = {"steps": len(taken), "skipped": sum("skipped" in step for step in taken), "last": taken[-1]}
    if "reward_real" in taken[-1] and tail:
        found["tail_reward_real"] = sum(step["reward_real"] for step in tail) / len(tail)
    held_out = directory / "held_out.json"
    return found | ({"held_out": json.loads(held_out.read_text())} if held_out.exists() else {})
