"""SFT, GSIL and reward training: parquet in, a model out. Ray Train gangs the workers (`pipelines.workers.gang`).

INPUT  demonstrations/train (SFT), iteration-1/pairs/train (GSIL) or rewards/init-sft/pairs/train (reward model)
OUTPUT policy/ or reward/ (Hugging Face directory; with LoRA also adapter/), metrics.jsonl, TensorBoard events,
       held_out.{json,parquet}, trained.json; checkpoints/ until it is done
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from actors.learner.deepspeed_config import deepspeed_config, read_deepspeed
from actors.learner.entry import trained
from actors.settings import Objective, Tracking, Training
from pipelines import base_model
from pipelines.means import mean_and_error
from pipelines.records import shards
from pipelines.run.artifacts import Run, Stage, StageError, Work
from pipelines.run.keeping import Need
from pipelines.run.restarts import restarts
from pipelines.workers.cluster import wait_for
from pipelines.workers.gang import Gang
from pipelines.workers.shards import last_words

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
    return Stage(name, settings, inputs, demand=training.demand(), version=5)


def train(training: Training, tracking: Tracking, longest: int, trust_remote_code: bool) -> Work:
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
            if not trained(str(place)) and not any(place.glob("checkpoints/*/done.json")):
                # From the first step again: what an attempt had reached that was stopped is no progress.
                (place / "metrics.jsonl").unlink(missing_ok=True)

        def reached() -> list[dict[str, Any]]:
            return [newest(place / "metrics.jsonl") for place in places.values()]

        def now() -> dict[str, float]:
            rates = [step["tokens_per_second"] for step in reached() if "tokens_per_second" in step]
            return {"tokens_per_second": rates[-1] if rates else 0, "restarts": sum(restarts(run.directory(stage)) for stage in stages)}

        run.display.follow(sum(map(steps, jobs)), "steps", lambda: sum(int(step.get("step", 0)) for step in reached()), now)
        try:
            # What an earlier attempt trained to the end stays.
            if left := [job for job in jobs if trained(job["output"]) is None]:
                # A ZeRO-3 engine stays in DeepSpeed's hands as long as its process lives: there every model has a gang of its own.
                alone = any(job["training"].zero_stage == 3 for job in left)
                for together in [[job] for job in left] if alone else [left]:
                    _gang_trains(run, stages[0].name, training, together, keep=not alone)
                    if trained(together[-1]["output"]) is None:
                        break
        finally:
            for name, place in places.items():
                for failure in sorted((place / "failed").glob("*.json")):
                    raise StageError(f"{name}: {json.loads(failure.read_text())['error']}")
        took = {stage.name: trained(str(run.directory(stage))) for stage in stages}
        if lost := [name for name, own in took.items() if own is None]:
            raise StageError(f"{lost[0]}: its workers ended before the training did (logs/job.log): the same command goes on")
        in_all = sum(own["seconds"] for own in took.values() if own)
        shares = {name: {"share": own["seconds"] / in_all, "work": own.get("work")} for name, own in took.items() if own}
        return {stage.name: numbers(run.directory(stage)) | shares[stage.name] for stage in stages}

    return work


def _gang_trains(run: Run, name: str, training: Training, jobs: list[dict[str, Any]], keep: bool) -> None:
    """Workers that wait, or new ones, train all `jobs`; errors are about the stage of a name."""
    from ray.exceptions import RayError

    workers = training.min_workers or training.workers
    need = Need(training.workers, training.cpus_per_worker, training.gpus_per_worker, grows=workers < training.workers)
    key = training.model_dump_json(include={"workers", "min_workers", "cpus_per_worker", "gpus_per_worker", "precision", "max_failures"})

    def start() -> Gang:
        wait_for(run, name, replace(need, count=workers))
        return Gang(run, training)

    try:
        # One that Ray Train may size anew does so while it waits, too.
        with run.keeper.borrowed("training", key, need, start, lambda _: keep and not need.grows) as gang:
            gang.train(jobs, run.keeper.close)
    except RayError as error:
        raise StageError(f"{name}: the training workers are gone: {last_words(error)} (logs/job.log has all of it)") from error


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


def numbers(directory: Path) -> dict[str, Any]:
    """The last step's metrics, the tail's mean reward of real responses with its error over steps, and the held-out scores."""
    taken = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # One batch alone would say it by chance.
    tail = [step for step in taken[-max(3, len(taken) // 4) :] if "skipped" not in step]
    found: dict[str, Any] = {"steps": len(taken), "skipped": sum("skipped" in step for step in taken), "last": taken[-1]}
    if "reward_real" in taken[-1] and tail:
        found["tail_reward_real"], found["tail_reward_real_stderr"] = mean_and_error([step["reward_real"] for step in tail])
    held_out = directory / "held_out.json"
    return found | ({"held_out": json.loads(held_out.read_text())} if held_out.exists() else {})
