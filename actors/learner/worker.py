"""One DeepSpeed worker of a training stage.

    rows -> batch_order -> deal -> collate -> ResponseLogProbs -> objective -> backward, once a micro-batch
                                                            '-> sums over workers -> metrics.jsonl, once a step

Every worker runs `train` with the same order. Nothing is divided before the end: losses are summed and divided once by the rows
of the global batch, so that any number of workers and micro-batches takes the same steps.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from actors.learner import checkpoint
from actors.learner.batches import Batch, Example, batch_order, collate, deal, shares_prompt
from actors.learner.data import Examples
from actors.learner.deepspeed_config import deepspeed_config
from actors.learner.logprobs import ResponseLogProbs
from actors.learner.objectives import OBJECTIVES, Side, sft
from actors.learner.tracking import Tracker
from actors.settings import Objective, Tracking, Training


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
    """directory for `policy/`, `metrics.jsonl`, `held_out.parquet`"""
    training: Training
    objective: Objective | None
    """None: SFT"""
    tracking: Tracking = field(default_factory=Tracking)
    trust_remote_code: bool = False


SUMS = ("rows", "tokens", "loss_real", "loss_generated", "rho_real", "rho_generated", "logps_real", "logps_generated", "correct")
"""What a step adds up over rows and workers, in this order."""


def train(job: TrainJob) -> None:
    """Runs one worker of a training stage from the first step to the exported policy.

    Args:
        job: the same on every worker. `torch.distributed` must be initialised.
    """
    import deepspeed

    rank, world = dist.get_rank(), dist.get_world_size()
    settings, output = job.training, Path(job.output)
    torch.manual_seed(settings.seed)
    examples = Examples(job.train)
    accumulation = settings.batch_size // (world * settings.micro_batch_size)
    order = list(batch_order(len(examples), settings.batch_size, settings.epochs, settings.seed))

    module = ResponseLogProbs(checkpoint.load(job.weights, settings, job.trust_remote_code))
    # Compiles C++ at the first start and serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, dist_init_required=False)
    decayed = [p for p in module.parameters() if p.ndim > 1]
    plain = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    engine, optimizer, _, _ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(groups, lr=settings.learning_rate),
        config=deepspeed_config(settings, world),
    )
    learner = Learner(job, engine, rank, world)

    tracker = Tracker(output, job.name, job.tracking, asdict_settings(job)) if rank == 0 else None
    for step, batch in enumerate(order):
        started = time.monotonic()
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        rate = learning_rate(settings, step, len(order))
        for group in optimizer.param_groups:
            group["lr"] = rate
        engine.train()
        for rows in deal(batch, examples.lengths, accumulation, rank, world):
            # A worker without a row of a short last batch repeats one with weight 0: all must take part in the reduction.
            weight = float(len(rows) > 0)
            chosen = [examples[row] for row in rows] or [examples[int(batch[0])]]
            losses, row_sums, _ = learner.losses(chosen)
            # DeepSpeed averages over workers and accumulation; undone here, the sum is divided by the global count alone.
            engine.backward(weight * losses.sum() * (world * accumulation / len(batch)))
            sums += weight * row_sums
            norm = gradient_norm(engine) if engine.is_gradient_accumulation_boundary() else None
            engine.step()
        dist.all_reduce(sums)
        if tracker:
            metrics = learner.metrics(sums) | {
                "grad_norm": norm if norm is not None else float(engine.get_global_grad_norm() or 0.0),
                "learning_rate": rate,
                "tokens_per_second": sums[SUMS.index("tokens")].item() / (time.monotonic() - started),
            }
            tracker.log({"step": step + 1, "steps": len(order), "epoch": (step + 1) / len(order) * settings.epochs, **metrics})

    if job.held_out:
        learner.score_held_out(Examples(job.held_out), output)
    checkpoint.export(engine, settings, job.tokenizer, output / "policy")
    if tracker:
        tracker.close()
    dist.barrier()


class Learner:
    """The forward half of a step: rows in, per-row losses and their sums out."""

    def __init__(self, job: TrainJob, engine: Any, rank: int, world: int):
        self.job, self.engine, self.rank, self.world = job, engine, rank, world
        model = engine.module.model
        self.share_prompt = shares_prompt(model.config)
        self.pad_id = model.config.get_text_config().eos_token_id or 0
        if isinstance(self.pad_id, list):
            self.pad_id = self.pad_id[0]
        self.device = next(model.parameters()).device

    def losses(self, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One forward pass.

        Returns:
            losses `[B]`; their sums in the order of SUMS `[9]`; log ratios (SFT: log-probs) `[B, sides]`, detached.
        """
        batch: Batch = collate(examples, self.pad_id, self.share_prompt).to(self.device)
        sides = len(examples[0].responses)
        logps_BS = self.engine(batch).view(len(examples), sides)
        lengths_BS = torch.tensor([[len(r) for r in e.responses] for e in examples], device=self.device)
        if self.job.objective is None:
            losses_B = sft(Side(logps_BS[:, 0], torch.zeros_like(logps_BS[:, 0]), lengths_BS[:, 0]))
            sums = [len(examples), batch.tokens, losses_B.sum(), 0, 0, 0, logps_BS[:, 0].sum(), 0, 0]
            return losses_B, _detached(sums), logps_BS.detach()
        refs_BS = torch.tensor([e.ref_logps for e in examples], dtype=torch.float32, device=self.device)
        real, generated = (Side(logps_BS[:, s], refs_BS[:, s], lengths_BS[:, s]) for s in range(2))
        parts = OBJECTIVES[self.job.objective.name](real, generated, self.job.objective)
        # A tie is half right: at step 0 every log ratio is 0 and the classifier at chance.
        correct = (real.rho_B > generated.rho_B).double() + 0.5 * (real.rho_B == generated.rho_B).double()
        sums = [len(examples), batch.tokens, parts.real_B.sum(), parts.generated_B.sum(), real.rho_B.sum(), generated.rho_B.sum()]
        sums += [real.logps_B.sum(), generated.logps_B.sum(), correct.sum()]
        return parts.real_B + parts.generated_B, _detached(sums), (logps_BS - refs_BS).detach()

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """Means over rows, in the words of the paper. Rewards are beta * rho."""
        total = dict(zip(SUMS, sums.tolist(), strict=True))
        rows = max(total["rows"], 1.0)
        mean = {name: value / rows for name, value in total.items()}
        if self.job.objective is None:
            return {"loss": mean["loss_real"], "logps_real": mean["logps_real"]}
        beta = self.job.objective.beta
        return {
            "loss": mean["loss_real"] + mean["loss_generated"],
            "loss_real": mean["loss_real"],
            "loss_generated": mean["loss_generated"],
            "reward_real": beta * mean["rho_real"],
            "reward_generated": beta * mean["rho_generated"],
            "margin": beta * (mean["rho_real"] - mean["rho_generated"]),
            "accuracy": mean["correct"],
            "logps_real": mean["logps_real"],
            "logps_generated": mean["logps_generated"],
        }

    @torch.no_grad()
    def score_held_out(self, examples: Examples, output: Path) -> None:
        """Scores held-out rows with the trained policy: one row each in `held_out.parquet`, the means in `held_out.json`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.engine.eval()
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        mine: list[tuple[int, str, list[float]]] = []
        size = self.world * self.job.training.micro_batch_size
        for start in range(0, len(examples), size):
            rows = np.arange(start, min(start + size, len(examples)))[self.rank :: self.world]
            chosen = [examples[int(row)] for row in rows] or [examples[start]]
            _, row_sums, values = self.losses(chosen)
            if len(rows):
                sums += row_sums
                mine += [(int(row), e.id, v) for row, e, v in zip(rows, chosen, values.tolist(), strict=True)]
        dist.all_reduce(sums)
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, mine)
        if self.rank == 0:
            ordered = sorted(row for part in gathered for row in part)
            names = ["logp_real"] if self.job.objective is None else ["rho_real", "rho_generated"]
            columns = {"id": [row[1] for row in ordered]} | {n: [row[2][s] for row in ordered] for s, n in enumerate(names)}
            pq.write_table(pa.table(columns), output / "held_out.parquet")
            (output / "held_out.json").write_text(json.dumps({"rows": len(ordered), **self.metrics(sums)}, indent=1))


def _detached(sums: list[Any]) -> torch.Tensor:
    return torch.tensor([float(value.detach()) if isinstance(value, torch.Tensor) else float(value) for value in sums], dtype=torch.float64)


def learning_rate(settings: Training, step: int, steps: int) -> float:
    """The rate of a step: linear warm-up over `warmup_ratio` of the steps, then the schedule down to 0 (constant: stays)."""
    warmup = int(np.ceil(settings.warmup_ratio * steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + np.cos(np.pi * progress))}
    return float(settings.learning_rate * shape[settings.schedule])


def gradient_norm(engine: Any) -> float | None:
    """The norm before clipping, where DeepSpeed does not compute it itself (float32 without ZeRO)."""
    if hasattr(engine.optimizer, "_global_grad_norm"):
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads])))


def asdict_settings(job: TrainJob) -> dict[str, Any]:
    """The job as plain values, for trackers."""
    return {k: v.model_dump() if hasattr(v, "model_dump") else v for k, v in job.__dict__.items()}


def run(job: dict[str, Any]) -> None:
    """Entry of a Ray Train worker: sets the threads it was given and trains."""
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    train(TrainJob(**job))
