"""One DeepSpeed worker of a training stage.

    rows -> batch_order -> deal -> collate -> ResponseLogProbs -> objective -> backward, once a micro-batch
                                                            '-> sums over workers -> metrics.jsonl, once a step

Every worker runs `train` with the same order. The order depends on nothing but the seed, so a worker that starts again goes on
behind the last checkpoint as if nothing had happened.
"""

import functools
import gc
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from actors.allocator import trim
from actors.learner import policy, tracking
from actors.learner.batches import batch_order
from actors.learner.checkpoint import Checkpoints
from actors.learner.data import Examples
from actors.learner.deepspeed_config import ELEMENTS_AT_ONCE, deepspeed_config
from actors.learner.entry import TRAINED
from actors.learner.learner import Learner
from actors.learner.logprobs import Head
from actors.learner.tracking import Tracker
from actors.notices import tell
from actors.settings import Objective, Tracking, Training

BAD_STEPS = 3
"""Steps in a row with a loss or gradient that is not finite, after which training stops."""

ALIKE_SECONDS = 10.0
"""Within which workers that fail for the same reason all do."""


@dataclass(frozen=True)
class TrainJob:
    """All that a worker is told."""

    name: str
    """for trackers: run and stage"""
    weights: str
    """directory or hub id of the policy to start from"""
    tokenizer: str
    """directory of the tokenizer that made the token ids; saved with the policy"""
    train: list[str]
    """parquet files, see `Examples`"""
    held_out: list[str]
    """the same for held-out rows; may be empty"""
    output: str
    """directory for the model in `policy/` or `reward/`, `metrics.jsonl`, `checkpoints/`, `held_out.parquet`"""
    training: Training
    objective: Objective
    tracking: Tracking = field(default_factory=Tracking)
    deepspeed: dict[str, Any] | None = None
    """what the user's own DeepSpeed JSON says"""
    longest: int | None = None
    """no prompt with one of its responses is longer, tokens; see `shares_prompt`"""
    trust_remote_code: bool = False
    kind: str = "policy"
    """what is trained, a key of `policy.KINDS`"""
    centre: list[str] = field(default_factory=list)
    """of a reward model: responses over which the mean and the standard deviation of its reward are taken, for its config"""


class TrainingError(ValueError):
    """Training that would fail again if it were started again; the text is for a person."""


def train(job: TrainJob) -> None:
    """Runs one worker of a training stage from the first step, or the last checkpoint, to the exported policy.

    Args:
        job: the same on every worker. `torch.distributed` must be initialised.

    Raises:
        ValueError: the settings do not fit the model, the checkpoint or the worker.
        TrainingError: losses stay infinite, or the policy on disk is not the one that was trained.
    """
    began = time.monotonic()
    settings, output = job.training, Path(job.output)
    tracking.require(job.tracking)
    torch.manual_seed(settings.seed)
    examples = Examples(job.train)
    checkpoints = Checkpoints(output / "checkpoints", settings, policy.architecture(job.weights, settings, job.trust_remote_code))
    found = checkpoints.newest()
    order = list(batch_order(len(examples), settings.batch_size, settings.epochs, settings.seed))
    model = policy.load(job.weights, settings.precision, job.longest, job.trust_remote_code, job.kind)
    model = policy.trainable(model, settings, job.kind)
    universal = found is not None and checkpoints.convert(found)
    engine = start_engine(policy.KINDS[job.kind].module(model), settings, job.deepspeed, universal)
    done = checkpoints.restore(engine, found, universal) if found else 0
    if found and dist.get_rank() == 0:
        world = dist.get_world_size()
        tell(f"{job.name}: training goes on behind step {done}, with {world} worker{'s' * (world > 1)}")
    learner = Learner(engine, job.objective, settings, job.longest)

    tracker = Tracker(output, job.name, job.tracking, settings_of(job), done) if dist.get_rank() == 0 else None
    skipped: list[list[str]] = []
    steps_began = time.monotonic()
    for step, batch in enumerate(order[done:], start=done + 1):
        started = time.monotonic()
        rate = learning_rate(settings, step - 1, len(order))
        metrics, bad_rows = learner.step(examples, batch, rate)
        if tracker:
            metrics |= {"learning_rate": rate, "tokens_per_second": metrics.pop("tokens") / (time.monotonic() - started)}
            tracker.log({"step": step, "steps": len(order), "epoch": step / len(order) * settings.epochs, **metrics})
        skipped = [*skipped, bad_rows] if bad_rows else []
        if len(skipped) == BAD_STEPS:
            raise TrainingError(_diverged(step, skipped, checkpoints))
        if settings.checkpoint_every and not skipped and (step % settings.checkpoint_every == 0 or step == len(order)):
            checkpoints.save(engine, step)

    if job.held_out:
        learner.score_held_out(Examples(job.held_out), output)
    facts: dict[str, float] = {}
    if job.centre:
        rewards = [values[0] for _, _, values in learner.score(Examples(job.centre))[0]]
        facts = {"reward_mean": float(np.mean(rewards)), "reward_std": float(np.std(rewards))}
    work = time.monotonic() - steps_began
    probe = learner.log_probs([examples[row] for row in range(min(2, len(examples)))])
    written = policy.export(engine, settings, job.weights, job.tokenizer, output / job.kind, job.trust_remote_code, job.kind, facts)
    if tracker:
        tracker.close()
    check_export(job, examples, probe, written)
    # Hooks hold it in circles through C++ that no garbage collector sees, and a gang has room for one at a time.
    engine.destroy()
    if tracker:
        temporary = output / f".{TRAINED}"
        temporary.write_text(json.dumps({"seconds": round(time.monotonic() - began, 1), "work": round(work, 1)}), encoding="utf-8")
        temporary.replace(output / TRAINED)


def start_engine(module: Any, settings: Training, theirs: dict[str, Any] | None = None, universal: bool = False) -> Any:
    """A DeepSpeed engine.

    Args:
        module: from a batch to numbers of its responses, around a model that is ready to train.
        settings: of the stage.
        theirs: what the user's own DeepSpeed JSON says.
        universal: whether a converted checkpoint will be loaded into it.
    """
    import deepspeed
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    # Compiles C++ at the first start and serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.get_backend() == "gloo":
        # Gloo gathers in memory that it asks for anew each time: all weights in one piece, 0.8 s a step, or in buckets, 0.2 s.
        deepspeed.comm.has_all_gather_into_tensor = lambda: False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, dist_init_required=False)
    if settings.zero_stage == 3 and any(isinstance(part, Head) for part in module.modules()):
        deepspeed.utils.set_z3_leaf_modules(module, [Head])
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    config = deepspeed_config(settings, dist.get_world_size(), theirs)
    if universal:
        config["checkpoint"] = {"load_universal": True}
    engine, _, _, _ = deepspeed.initialize(model=module, optimizer=_optimizer(groups, settings), config=config)
    if not engine.zero_optimization() or isinstance(engine.optimizer, BF16_Optimizer):
        # There DeepSpeed reduces in one piece, a second copy of all gradients, also where one worker has nothing to reduce.
        engine.enable_backward_allreduce = dist.get_world_size() > 1
        engine.allreduce_gradients = functools.partial(engine.allreduce_gradients, bucket_size=ELEMENTS_AT_ONCE)
    return engine


def _optimizer(groups: list[dict[str, Any]], settings: Training) -> torch.optim.Optimizer:
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=settings.learning_rate, alpha=0.99)
    if settings.offload and settings.gpus_per_worker:
        # The optimizer's state lives in CPU memory: DeepSpeed's vectorised AdamW updates it there.
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=settings.learning_rate, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def check_export(job: TrainJob, examples: Examples, probe: list[float], written: dict[str, int]) -> None:
    """Loads the exported model back, and compares its weights with those that were to be written, and its log-probs or rewards of a few
    rows with the trainer's. A collective.

    Raises:
        TrainingError: they differ.
    """
    from actors.scorer import Scorer
    from actors.settings import Scoring

    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        settings, weights = job.training, str(Path(job.output) / job.kind)
        scoring = Scoring(num_cpus=torch.get_num_threads())
        scorer = Scorer(weights, scoring, settings.precision, job.longest, job.trust_remote_code, job.kind)
        # Some architectures keep a few weights in float32, whatever they are loaded in.
        loaded_in = policy.DTYPES[settings.precision]
        found = policy.digests({name: p.to(loaded_in) for name, p in scorer.module.model.named_parameters(remove_duplicate=False)})
        wrong = [name for name, digest in found.items() if written.get(name) != digest]
        loaded = [value for row in range(min(2, len(examples))) for value in scorer([examples[row]])[0]]
        relative, absolute = 1e-3, 1e-2
        if settings.precision == "bfloat16":
            # A log-prob is a sum over the tokens of a response, a reward a single number. Merging adapters rounds anew: rewards of four
            # models were up to 0.18 apart in 24 draws, and 0.45 where the updates were lost.
            relative, absolute = 2e-2, 0.5 if job.kind == "policy" else 0.3 if settings.lora_r else 0.2
        if wrong:
            problem = [
                f"the {job.kind} in {weights} is not what was trained: {len(wrong)} of {len(found)} weights differ, {wrong[0]} first"
            ]
        elif any(abs(a - b) > absolute + relative * abs(b) for a, b in zip(loaded, probe, strict=True)):
            problem = [f"the {job.kind} in {weights} gives {loaded}, the trainer gave {probe}: what was written is not it"]
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise TrainingError(problem[0])


def _diverged(step: int, skipped: list[list[str]], checkpoints: Checkpoints) -> str:
    rows = sorted({row for rows in skipped for row in rows})
    found = checkpoints.newest()
    kept = f"the last good checkpoint is {found['path']}" if found else "there is no checkpoint yet"
    return (
        f"the loss or its gradient was not finite in {len(skipped)} steps in a row, up to step {step}, "
        f"on the rows {', '.join(rows)}; {kept}. Look at these rows, or lower the learning rate or beta"
    )


def learning_rate(settings: Training, step: int, steps: int) -> float:
    """The rate of a step: linear warm-up over `warmup_ratio` of the steps, then the schedule down to 0 (constant: stays)."""
    warmup = int(np.ceil(settings.warmup_ratio * steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + np.cos(np.pi * progress))}
    return float(settings.learning_rate * shape[settings.schedule])


def settings_of(job: TrainJob) -> dict[str, Any]:
    """The job as plain values, for trackers."""
    return {k: v.model_dump() if hasattr(v, "model_dump") else v for k, v in job.__dict__.items()}


def run(job: dict[str, Any]) -> bool:
    """One training of a Ray Train worker: sets the threads it was given, trains, and gives back what it held. Returns whether it is done.

    What would fail again is written to `failed/RANK.json`. When all workers fail alike they end without being started again; one that
    fails alone raises, so that those that wait for it are stopped, and stops before it loads a model when it is started again.
    """
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    failed = Path(job["output"], "failed")
    for earlier in failed.glob("*.json"):
        raise TrainingError(json.loads(earlier.read_text(encoding="utf-8"))["error"])
    try:
        train(TrainJob(**job))
        gc.collect()
        trim()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True
    except ValueError as error:
        failed.mkdir(exist_ok=True)
        (failed / f"{dist.get_rank()}.json").write_text(json.dumps({"error": str(error)}), encoding="utf-8")
        deadline = time.monotonic() + ALIKE_SECONDS
        while len(list(failed.glob("*.json"))) < dist.get_world_size():
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        return False
