"""The table of objectives: what a training step minimises.

A pure function: the scores of both sides `[B]` in, the loss of each side per sequence `[B]` out. Whoever calls it reduces.
Notation and sources: `y_r` a demonstration ("real"), `y_g` a sample of the policy ("generated"),
rho = log pi(y|x) - log pi_ref(y|x), score f = beta * rho + gamma.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from actors.settings import Objective


class Side(NamedTuple):
    """One side of a batch of pairs, each `[B]`."""

    logps_B: torch.Tensor
    """sum of log pi(token) over the response"""
    ref_logps_B: torch.Tensor
    """the same under the reference policy; no gradient"""
    lengths_B: torch.Tensor
    """response tokens"""

    @property
    def rho_B(self) -> torch.Tensor:
        """Log ratio, summed over tokens, nats."""
        return self.logps_B - self.ref_logps_B


class Losses(NamedTuple):
    """The two parts of a loss, each `[B]`; the loss of a pair is their sum."""

    real_B: torch.Tensor
    generated_B: torch.Tensor


def logistic(real: Side, generated: Side, objective: Objective) -> Losses:
    """softplus(-f_r) + softplus(f_g): logistic regression of real against generated (GSIL, arXiv 2410.10093)."""
    f_r_B = objective.beta * real.rho_B + objective.gamma
    f_g_B = objective.beta * generated.rho_B + objective.gamma
    return Losses(F.softplus(-f_r_B), F.softplus(f_g_B))


def sft(real: Side) -> torch.Tensor:
    """-log pi(y_r|x) / |y_r|, `[B]`: behaviour cloning, each sequence with the same weight."""
    return -real.logps_B / real.lengths_B


OBJECTIVES: dict[str, Callable[[Side, Side, Objective], Losses]] = {"logistic": logistic}
