"""The learner: rows in, one optimizer step out.

Nothing is divided before the end: losses are summed over micro-batches and workers and divided once by the rows of the global
batch, so that any number of workers and any size of micro-batches take the same steps.

Shapes: B rows of a micro-batch, S responses of a row (1: demonstration, 2: pair), C kinds of value that the engine gives of a response
(log-prob and occupancy-weighted log-prob; of a reward model its reward alone).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from actors.learner import policy
from actors.learner.batches import Dealt, Example, collate, deal, shares_prompt
from actors.learner.data import Examples
from actors.learner.objectives import Pair, Side, losses, ratio
from actors.settings import Objective, Training

SUMS = (
    "rows",
    "tokens",
    "loss",
    "loss_real",
    "loss_generated",
    "clamped",
    "rho_real",
    "rho_generated",
    "logps_real",
    "logps_generated",
    "correct",
)
"""What a step adds up over rows and workers, in this order."""


class Learner:
    """Takes steps with a DeepSpeed engine.

    Args:
        engine: around a `ResponseLogProbs` or `ResponseRewards`.
        objective: what a step minimises.
        settings: of the training stage.
        longest: no prompt with one of its responses is longer, tokens.
    """

    def __init__(self, engine: Any, objective: Objective, settings: Training, longest: int | None = None):
        self.engine, self.objective, self.settings = engine, objective, settings
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        model = engine.module.model
        self.share_prompt = shares_prompt(model.config, longest)
        self.pad_id = model.config.get_text_config().eos_token_id or 0
        if isinstance(self.pad_id, list):
            self.pad_id = self.pad_id[0]
        self.device = engine.device
        self.layers = [layer for layer in model.modules() if hasattr(layer, "gradient_checkpointing")]

    def step(self, examples: Examples, batch: np.ndarray, rate: float) -> tuple[dict[str, float], list[str]]:
        """One optimizer step on a global batch. A collective.

        Args:
            examples: the data set.
            batch: row indices of the global batch, the same on every worker.
            rate: learning rate.

        Returns:
            metrics (means over the rows), and the ids of rows to blame where the step was skipped because the loss or its gradient was
            not finite, else nothing.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.train()
        parts = self._deal(examples, batch)
        baseline = self._baseline(examples, [part.rows for part in parts], len(batch)) if self.objective.function == "kto" else 0.0
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        bad_rows: list[str] = []
        for number, (rows, longest) in enumerate(parts, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(parts))
            self._recompute(longest)
            # A worker without a row repeats one with weight 0: all must take part in the reduction.
            chosen = [examples[row] for row in rows] or [examples[int(batch[0])]]
            losses_B, row_sums, _ = self._losses(chosen, baseline)
            # DeepSpeed averages over workers; undone here, the sum is divided by the global count alone.
            scale = self.world / len(batch) if len(rows) else 0.0
            bad = [e.id for e, loss in zip(chosen, losses_B.tolist(), strict=True) if not np.isfinite(loss)]
            # An infinite loss can have a finite gradient; this one is noticed on all workers, and the step left out.
            self.engine.backward((torch.nan if bad else scale) * losses_B.sum(), scale_wrt_gas=False)
            if len(rows):
                sums += row_sums
                bad_rows += bad
        sums = self._over_workers(sums)
        norm = self._update()
        metrics = self._metrics(sums) | {"tokens": sums[SUMS.index("tokens")].item(), "grad_norm": norm}
        if np.isfinite(norm):
            return metrics, []
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, bad_rows)
        return metrics | {"skipped": 1.0}, sorted({i for part in gathered for i in part}) or [examples[int(row)].id for row in batch]

    def _recompute(self, longest: int) -> None:
        """A row beyond the budget of a micro-batch keeps to it another way: its activations are computed twice."""
        if self.settings.gradient_checkpointing == "auto" and policy.recomputes(self.engine.module.model):
            for layer in self.layers:
                layer.gradient_checkpointing = longest > self.settings.micro_batch_tokens

    def _deal(self, examples: Examples, batch: np.ndarray) -> list[Dealt]:
        return deal(batch, examples.cost(self.share_prompt), self.settings.micro_batch_tokens, self.rank, self.world)

    def _update(self) -> float:
        """Applies the gradients if they are finite; returns their norm before clipping."""
        if self.engine.zero_optimization():
            # ZeRO leaves out a step whose gradients are not finite, on all workers alike.
            self.engine.step()
            return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else float("inf")
        norms = [torch.linalg.vector_norm(p.grad) for p in self.engine.module.parameters() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if np.isfinite(norm):
            self.engine.step()
        else:
            self.engine.zero_grad()
        return norm

    def _losses(self, examples: Sequence[Example], baseline: torch.Tensor | float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One forward pass.

        Returns:
            losses `[B]`; their sums in the order of SUMS; log ratios (without a reference: log-probs) `[B, S]`, detached.
        """
        batch = collate(examples, self.pad_id, self.share_prompt).to(self.device)
        count = len(examples[0].responses)
        # Log-probs and occupancy-weighted ones; of a reward model the reward, which then stands for the log ratio.
        logps_CBS = self.engine(batch).view(-1, len(examples), count)
        lengths_BS = torch.tensor([[len(r) for r in e.responses] for e in examples], dtype=torch.float32, device=self.device)
        # Without a reference (SFT, rewards) the values themselves stand for the log ratios.
        refs = [list(e.ref_logps) or [0.0] * count for e in examples]
        refs_BS = torch.tensor(refs, dtype=torch.float32, device=self.device)
        sides = [Side(logps_CBS[0, :, s], refs_BS[:, s], lengths_BS[:, s], logps_CBS[-1, :, s]) for s in range(count)]
        real, generated = sides[0], sides[-1]
        parts = losses(Pair(real, generated, baseline), self.objective)
        rhos_BS = torch.stack([ratio(side, self.objective) for side in sides], dim=1).detach()
        # A tie is half right: at step 0 every log ratio is 0 and the classifier at chance.
        correct_B = (rhos_BS[:, 0] > rhos_BS[:, -1]).double() + 0.5 * (rhos_BS[:, 0] == rhos_BS[:, -1]).double()
        columns = [parts.loss_B, parts.real_B, parts.generated_B, parts.clamped_B, rhos_BS[:, 0], rhos_BS[:, -1]]
        columns += [real.logps_B, generated.logps_B, correct_B]
        added = torch.stack([column.detach().double().sum() for column in columns]).cpu()
        return parts.loss_B, torch.cat([torch.tensor([len(examples), batch.tokens], dtype=torch.float64), added]), rhos_BS

    @torch.no_grad()
    def _baseline(self, examples: Examples, parts: list[np.ndarray], rows: int) -> torch.Tensor:
        """KTO's z0: max(0, mean of beta * rho over the global batch with mismatched responses). A collective."""
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            chosen = [examples.mismatched(int(row)) for row in part] or [examples.mismatched(0)]
            logps_B = self.engine(collate(chosen, self.pad_id, self.share_prompt).to(self.device))[0].cpu()
            refs_B, lengths_B = (torch.tensor(v) for v in ([e.ref_logps[0] for e in chosen], [len(e.responses[0]) for e in chosen]))
            rho_B = ratio(Side(logps_B, refs_B, lengths_B), self.objective)
            total += self.objective.beta * rho_B.double().sum() * float(len(part) > 0)
        return (self._over_workers(total) / rows).clamp(min=0).float().to(self.device)

    def _over_workers(self, sums: torch.Tensor) -> torch.Tensor:
        """Adds up a CPU tensor over all workers, through the device that the backend knows. A collective."""
        sums = sums.to(self.device)
        dist.all_reduce(sums)
        return sums.cpu()

    def _metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """Means over rows, in the words of the papers. Rewards are beta * rho."""
        total = dict(zip(SUMS, sums.tolist(), strict=True))
        mean = {name: value / max(total["rows"], 1.0) for name, value in total.items()}
        if self.objective.name == "sft":
            return {"loss": mean["loss"], "logps_real": mean["logps_real"]}
        beta = self.objective.beta
        return {
            "loss": mean["loss"],
            "loss_real": mean["loss_real"],
            "loss_generated": mean["loss_generated"],
            "reward_real": beta * mean["rho_real"],
            "reward_generated": beta * mean["rho_generated"],
            "margin": beta * (mean["rho_real"] - mean["rho_generated"]),
            "accuracy": mean["correct"],
            "logps_real": mean["logps_real"],
            "logps_generated": mean["logps_generated"],
            "clamped": total["clamped"],
        }

    @torch.no_grad()
    def log_probs(self, examples: Sequence[Example]) -> list[float]:
        """The trainer's log-probs (or rewards) of all responses of a few rows. A collective."""
        self.engine.eval()
        values = [self.engine(collate([e], self.pad_id, self.share_prompt).to(self.device))[0].tolist() for e in examples]
        return [value for row in values for value in row]

    def score_held_out(self, examples: Examples, output: Path) -> None:
        """Scores held-out rows with the trained model: one row each in `held_out.parquet`, the means in `held_out.json`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows, metrics = self.score(examples)
        if self.rank == 0:
            names = ["rho_real", "rho_generated"] if len(rows[0][2]) == 2 else ["logp_real"]
            columns = {"id": [row[1] for row in rows]} | {n: [row[2][s] for row in rows] for s, n in enumerate(names)}
            pq.write_table(pa.table(columns), output / "held_out.parquet")
            (output / "held_out.json").write_text(json.dumps({"rows": len(rows), "prompts": len(set(columns["id"])), **metrics}, indent=1))

    @torch.no_grad()
    def score(self, examples: Examples) -> tuple[list[tuple[int, str, list[float]]], dict[str, float]]:
        """Forward passes over a whole data set. A collective.

        Returns:
            (row number, id, log ratio or reward of every response) in order, and the means of a step's metrics.
        """
        self.engine.eval()
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        mine: list[tuple[int, str, list[float]]] = []
        for rows, _ in self._deal(examples, np.arange(len(examples))):
            chosen = [examples[int(row)] for row in rows] or [examples[0]]
            _, row_sums, values = self._losses(chosen)
            if len(rows):
                sums += row_sums
                mine += [(int(row), e.id, v) for row, e, v in zip(rows, chosen, values.tolist(), strict=True)]
        sums = self._over_workers(sums)
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, mine)
        return sorted(row for part in gathered for row in part), self._metrics(sums)
