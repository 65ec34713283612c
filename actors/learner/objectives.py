"""The table of objectives: what a training step minimises.

Pure functions: both sides of a batch of pairs `[B]` in, the loss per pair `[B]` out. Whoever calls them reduces.

Notation (that of the three papers in one): `y_r` the real response (a demonstration, or the chosen one of a preference pair),
`y_g` the generated one (a sample of the policy, or the rejected one), logp(y) = sum over response tokens of log pi(token | prefix),
rho = logp - ref_logp, divided by |y| where `length_normalised`; score f = beta * rho + gamma.

    pointwise   classify y_r and y_g each by its own score     logistic hinge brier exponential kliep lsif kto
    pairwise    look at the difference of the two               dpo f-dpo ipo slic cpo simpo
    neither     nothing but the SFT term                        sft

Presets (`actors.presets.PRESETS`) are names for a function of this table and its numbers: DIL's ukl is `kliep` with beta 1 and rho
per token, SPIN is `dpo` on self-generated pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from actors.settings import Objective

MAX_EXPONENT = 10.0
"""Beyond it, exp goes on along its tangent: losses stay finite and monotone, gradients stay below exp(10) = 22,026."""


class Side(NamedTuple):
    """One side of a batch of pairs, each `[B]`."""

    logps_B: torch.Tensor
    """sum of log pi(token) over the response, nats"""
    ref_logps_B: torch.Tensor
    """the same under the reference policy; no gradient"""
    lengths_B: torch.Tensor
    """response tokens"""
    occupancy_B: torch.Tensor | None = None
    """sum of (T - k) / T * log pi(token k), k = 0..T-1; read by the SFT term with occupancy weighting only"""

    @property
    def rho_B(self) -> torch.Tensor:
        """Log ratio, summed over tokens, nats."""
        return self.logps_B - self.ref_logps_B

    @property
    def mean_logps_B(self) -> torch.Tensor:
        """Log-prob per token, nats."""
        return self.logps_B / self.lengths_B


class Pair(NamedTuple):
    """What an objective looks at."""

    real: Side
    generated: Side
    baseline: torch.Tensor | float = 0.0
    """KTO's z0 >= 0, the policy's beta * rho on mismatched prompts and responses, averaged over the global batch"""


class Losses(NamedTuple):
    """Each `[B]`. The loss of a pair is the sum of the three parts."""

    real_B: torch.Tensor
    """what y_r alone adds"""
    generated_B: torch.Tensor
    """what y_g alone adds"""
    joint_B: torch.Tensor
    """what cannot be divided between the two"""
    clamped_B: torch.Tensor
    """how many exponentials were continued by their tangent"""

    @property
    def loss_B(self) -> torch.Tensor:
        """The loss of each pair."""
        return self.real_B + self.generated_B + self.joint_B


def _pointwise(real_B: torch.Tensor, generated_B: torch.Tensor, clamped_B: torch.Tensor | None = None) -> Losses:
    zero_B = torch.zeros_like(real_B)
    return Losses(real_B, generated_B, zero_B, zero_B if clamped_B is None else clamped_B)


def _pairwise(joint_B: torch.Tensor, clamped_B: torch.Tensor | None = None) -> Losses:
    zero_B = torch.zeros_like(joint_B)
    return Losses(zero_B, zero_B, joint_B, zero_B if clamped_B is None else clamped_B)


def ratio(side: Side, o: Objective) -> torch.Tensor:
    """rho, `[B]`: summed over tokens, or per token where the objective is length-normalised."""
    return side.rho_B / side.lengths_B if o.length_normalised else side.rho_B


def _scores(pair: Pair, o: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    return o.beta * ratio(pair.real, o) + o.gamma, o.beta * ratio(pair.generated, o) + o.gamma


def _exp(x_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp up to MAX_EXPONENT and its tangent beyond; 1 where it went beyond."""
    low_B = x_B.clamp(max=MAX_EXPONENT)
    return low_B.exp() + (x_B - low_B) * torch.e**MAX_EXPONENT, (x_B > MAX_EXPONENT).to(x_B.dtype)


def _smoothed_softplus(x_B: torch.Tensor, o: Objective) -> torch.Tensor:
    """softplus(x), with a share `label_smoothing` of the labels turned round."""
    return F.softplus(x_B) - o.label_smoothing * x_B


def logistic(pair: Pair, o: Objective) -> Losses:
    """softplus(-f_r) + softplus(f_g): logistic regression (GSIL, arXiv 2410.10093; DIL's bce with rho per token)."""
    f_r_B, f_g_B = _scores(pair, o)
    return _pointwise(_smoothed_softplus(-f_r_B, o), _smoothed_softplus(f_g_B, o))


def hinge(pair: Pair, o: Objective) -> Losses:
    """max(0, 1 - f_r) + max(0, 1 + f_g) (GSIL)."""
    f_r_B, f_g_B = _scores(pair, o)
    return _pointwise(F.relu(1 - f_r_B), F.relu(1 + f_g_B))


def brier(pair: Pair, o: Objective) -> Losses:
    """(1 - sigmoid(f_r))^2 + sigmoid(f_g)^2 (GSIL)."""
    f_r_B, f_g_B = _scores(pair, o)
    return _pointwise(torch.sigmoid(-f_r_B) ** 2, torch.sigmoid(f_g_B) ** 2)


def exponential(pair: Pair, o: Objective) -> Losses:
    """exp(-f_r) + exp(f_g) (GSIL). At the optimum f is half the log of the density ratio."""
    f_r_B, f_g_B = _scores(pair, o)
    (real_B, high_r_B), (generated_B, high_g_B) = _exp(-f_r_B), _exp(f_g_B)
    return _pointwise(real_B, generated_B, high_r_B + high_g_B)


def kliep(pair: Pair, o: Objective) -> Losses:
    """-f_r + exp(f_g): Kullback-Leibler importance estimation (GSIL; DIL's ukl with rho per token)."""
    f_r_B, f_g_B = _scores(pair, o)
    generated_B, high_B = _exp(f_g_B)
    return _pointwise(-f_r_B, generated_B, high_B)


def lsif(pair: Pair, o: Objective) -> Losses:
    """-exp(f_r) + exp(2 f_g) / 2: least-squares importance fitting (GSIL; DIL with rho per token)."""
    f_r_B, f_g_B = _scores(pair, o)
    (real_B, high_r_B), (generated_B, high_g_B) = _exp(f_r_B), _exp(2 * f_g_B)
    return _pointwise(-real_B, generated_B / 2, high_r_B + high_g_B)


def kto(pair: Pair, o: Objective) -> Losses:
    """1 - sigmoid(beta rho_r - z0) + 1 - sigmoid(z0 - beta rho_g), both weights 1 (KTO, arXiv 2402.01306)."""
    z_r_B, z_g_B = (o.beta * ratio(side, o) - pair.baseline for side in (pair.real, pair.generated))
    return _pointwise(torch.sigmoid(-z_r_B), torch.sigmoid(z_g_B))


def dpo(pair: Pair, o: Objective) -> Losses:
    """softplus(-beta (rho_r - rho_g)) (DPO, arXiv 2305.18290; SPIN, arXiv 2401.01335, on self-generated pairs)."""
    return _pairwise(_smoothed_softplus(-o.beta * (ratio(pair.real, o) - ratio(pair.generated, o)), o))


def fdpo_forward_kl(pair: Pair, o: Objective) -> Losses:
    """softplus(-beta (f'(u_r) - f'(u_g))), u = exp(rho), f'(u) = -1/u (f-DPO, arXiv 2309.16240)."""
    (real_B, high_r_B), (generated_B, high_g_B) = (_exp(-ratio(side, o)) for side in (pair.real, pair.generated))
    return _pairwise(_smoothed_softplus(-o.beta * (generated_B - real_B), o), high_r_B + high_g_B)


def fdpo_js(pair: Pair, o: Objective) -> Losses:
    """As `fdpo_forward_kl` with f'(u) = log(2u / (1 + u)) = log 2 - softplus(-rho) (Jensen-Shannon)."""
    real_B, generated_B = (F.softplus(-ratio(side, o)) for side in (pair.real, pair.generated))
    return _pairwise(_smoothed_softplus(-o.beta * (generated_B - real_B), o))


def fdpo_alpha(pair: Pair, o: Objective) -> Losses:
    """As `fdpo_forward_kl` with f'(u) = (1 - u^-alpha) / alpha; alpha 1 is the forward KL, alpha -> 0 the reverse KL (DPO)."""
    (real_B, high_r_B), (generated_B, high_g_B) = (_exp(-o.alpha * ratio(side, o)) for side in (pair.real, pair.generated))
    return _pairwise(_smoothed_softplus(-o.beta * (generated_B - real_B) / o.alpha, o), high_r_B + high_g_B)


def ipo(pair: Pair, o: Objective) -> Losses:
    """(rho_r / |y_r| - rho_g / |y_g| - 1 / (2 beta))^2 (IPO, arXiv 2310.12036, per token as usual)."""
    return _pairwise((ratio(pair.real, o) - ratio(pair.generated, o) - 1 / (2 * o.beta)) ** 2)


def slic(pair: Pair, o: Objective) -> Losses:
    """max(0, delta - (logp_r - logp_g)), without a reference (SLiC-HF, arXiv 2305.10425; its second term is the SFT term)."""
    return _pairwise(F.relu(o.delta - (pair.real.logps_B - pair.generated.logps_B)))


def cpo(pair: Pair, o: Objective) -> Losses:
    """softplus(-beta (logp_r - logp_g)), without a reference (CPO, arXiv 2401.08417; its second term is the SFT term)."""
    return _pairwise(_smoothed_softplus(-o.beta * (pair.real.logps_B - pair.generated.logps_B), o))


def simpo(pair: Pair, o: Objective) -> Losses:
    """softplus(-(beta (logp_r / |y_r| - logp_g / |y_g|) - gamma)), without a reference (SimPO, arXiv 2405.14734)."""
    return _pairwise(_smoothed_softplus(o.gamma - o.beta * (pair.real.mean_logps_B - pair.generated.mean_logps_B), o))


def sft(side: Side, weighting: str = "uniform") -> torch.Tensor:
    """-logp(y_r) / |y_r|, `[B]`: behaviour cloning, each sequence with the same weight.

    Args:
        side: the real responses.
        weighting: "occupancy" counts token k of T (T - k) / T times: forward KL on state-action occupancy (AfD, arXiv 2405.15624,
            appendix D.1).
    """
    if weighting == "uniform":
        return -side.mean_logps_B
    assert side.occupancy_B is not None
    return -side.occupancy_B / side.lengths_B


def sft_only(pair: Pair, o: Objective) -> Losses:
    """Nothing: the SFT term stands alone."""
    return _pairwise(torch.zeros_like(pair.real.logps_B))


OBJECTIVES: dict[str, Callable[[Pair, Objective], Losses]] = {
    "logistic": logistic,
    "hinge": hinge,
    "brier": brier,
    "exponential": exponential,
    "kliep": kliep,
    "lsif": lsif,
    "kto": kto,
    "dpo": dpo,
    "fdpo_forward_kl": fdpo_forward_kl,
    "fdpo_js": fdpo_js,
    "fdpo_alpha": fdpo_alpha,
    "ipo": ipo,
    "slic": slic,
    "cpo": cpo,
    "simpo": simpo,
    "sft": sft_only,
}


def losses(pair: Pair, o: Objective) -> Losses:
    """The loss of each pair under an objective, its SFT term in the part of y_r."""
    found = OBJECTIVES[o.function](pair, o)
    return found._replace(real_B=found.real_B + o.sft_weight * sft(pair.real, o.sft_weighting)) if o.sft_weight else found
