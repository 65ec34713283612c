"""Objectives against numbers computed by hand, their safety far out, and whether they find a known density ratio."""

import math
import typing
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.learner.objectives import MAX_EXPONENT, OBJECTIVES, Losses, Pair, Side, losses, sft
from actors.presets import PRESETS
from actors.settings import READ_BY, SMOOTHED, Objective, PresetName


def side(logps: list[float], refs: list[float], lengths: list[int]) -> Side:
    def tensor(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return Side(tensor(logps).requires_grad_(), tensor(refs), tensor([float(n) for n in lengths]), tensor([0.0] * len(logps)))


def example() -> Pair:
    """rho_r = 2 over 2 tokens, rho_g = -1 over 4 tokens."""
    return Pair(side([-3.0], [-5.0], [2]), side([-4.0], [-3.0], [4]), baseline=0.05)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


BY_HAND: list[tuple[str, dict[str, Any], float, float, float]] = [
    # preset, numbers, loss, d loss / d logp_r, d loss / d logp_g. With beta 0.5 and gamma 0.2: f_r = 1.2, f_g = -0.3.
    ("gsil_logistic", {}, softplus(-1.2) + softplus(-0.3), -0.5 * sigmoid(-1.2), 0.5 * sigmoid(-0.3)),
    (
        "gsil_logistic",
        {"label_smoothing": 0.1},
        0.9 * (softplus(-1.2) + softplus(-0.3)) + 0.1 * (softplus(1.2) + softplus(0.3)),
        0.5 * (0.1 * sigmoid(1.2) - 0.9 * sigmoid(-1.2)),
        0.5 * (0.9 * sigmoid(-0.3) - 0.1 * sigmoid(0.3)),
    ),
    ("gsil_hinge", {}, 0.0 + 0.7, 0.0, 0.5),
    (
        "gsil_brier",
        {},
        sigmoid(-1.2) ** 2 + sigmoid(-0.3) ** 2,
        -0.5 * 2 * sigmoid(-1.2) ** 2 * sigmoid(1.2),
        0.5 * 2 * sigmoid(-0.3) ** 2 * sigmoid(0.3),
    ),
    ("gsil_exponential", {}, math.exp(-1.2) + math.exp(-0.3), -0.5 * math.exp(-1.2), 0.5 * math.exp(-0.3)),
    ("gsil_kliep", {}, -1.2 + math.exp(-0.3), -0.5, 0.5 * math.exp(-0.3)),
    ("gsil_lsif", {}, -math.exp(1.2) + 0.5 * math.exp(-0.6), -0.5 * math.exp(1.2), 0.5 * math.exp(-0.6)),
    # Per token rho_r = 1, rho_g = -1/4.
    ("dil_lsif", {"beta": 1, "gamma": 0}, -math.e + 0.5 * math.exp(-0.5), -math.e / 2, math.exp(-0.5) / 4),
    ("dil_ukl", {"beta": 1, "gamma": 0}, -1 + math.exp(-0.25), -0.5, math.exp(-0.25) / 4),
    ("dil_bce", {"beta": 1, "gamma": 0}, softplus(-1) + softplus(-0.25), -sigmoid(-1) / 2, sigmoid(-0.25) / 4),
    # beta (rho_r - rho_g) = 1.5
    ("spin", {}, softplus(-1.5), -0.5 * sigmoid(-1.5), 0.5 * sigmoid(-1.5)),
    ("dpo", {}, softplus(-1.5), -0.5 * sigmoid(-1.5), 0.5 * sigmoid(-1.5)),
    (
        "dpo",
        {"label_smoothing": 0.2},
        0.8 * softplus(-1.5) + 0.2 * softplus(1.5),
        0.5 * (0.2 * sigmoid(1.5) - 0.8 * sigmoid(-1.5)),
        -0.5 * (0.2 * sigmoid(1.5) - 0.8 * sigmoid(-1.5)),
    ),
    ("fdpo_reverse_kl", {}, softplus(-1.5), -0.5 * sigmoid(-1.5), 0.5 * sigmoid(-1.5)),
    # f'(u) = -1/u: z = 0.5 (-exp(-2) + exp(1))
    (
        "fdpo_forward_kl",
        {},
        softplus(-0.5 * (math.e - math.exp(-2))),
        -0.5 * math.exp(-2) * sigmoid(-0.5 * (math.e - math.exp(-2))),
        0.5 * math.e * sigmoid(-0.5 * (math.e - math.exp(-2))),
    ),
    # f'(u) = log(2u / (1 + u)): z = 0.5 (log sigmoid(2) - log sigmoid(-1))
    (
        "fdpo_js",
        {},
        softplus(-0.5 * math.log(sigmoid(2) / sigmoid(-1))),
        -0.5 * sigmoid(-2) * sigmoid(-0.5 * math.log(sigmoid(2) / sigmoid(-1))),
        0.5 * sigmoid(1) * sigmoid(-0.5 * math.log(sigmoid(2) / sigmoid(-1))),
    ),
    # f'(u) = (1 - u^-1/2) / (1/2): z = exp(1/2) - exp(-1)
    (
        "fdpo_alpha",
        {"alpha": 0.5},
        softplus(-(math.exp(0.5) - math.exp(-1))),
        -0.5 * math.exp(-1) * sigmoid(-(math.exp(0.5) - math.exp(-1))),
        0.5 * math.exp(0.5) * sigmoid(-(math.exp(0.5) - math.exp(-1))),
    ),
    # (1 + 1/4 - 1 / (2 * 0.5))^2
    ("ipo", {}, 0.25**2, 2 * 0.25 / 2, -2 * 0.25 / 4),
    # max(0, 2.5 - 1) + 0.3 * 3 / 2
    ("slic", {"delta": 2.5, "sft_weight": 0.3}, 1.5 + 0.45, -1 - 0.15, 1.0),
    ("cpo", {"sft_weight": 0.3}, softplus(-0.5) + 0.45, -0.5 * sigmoid(-0.5) - 0.15, 0.5 * sigmoid(-0.5)),
    # beta (-3/2 + 4/4) - gamma = -0.25 - 0.2
    ("simpo", {}, softplus(0.45), -0.25 * sigmoid(0.45), 0.125 * sigmoid(0.45)),
    # beta rho = 1, -0.5; z0 = 0.05
    (
        "kto",
        {"gamma": 0},
        sigmoid(-0.95) + sigmoid(-0.55),
        -0.5 * sigmoid(0.95) * sigmoid(-0.95),
        0.5 * sigmoid(0.55) * sigmoid(-0.55),
    ),
    ("sft", {}, 1.5, -0.5, 0.0),
    ("dpo", {"sft_weight": 2.0}, softplus(-1.5) + 3.0, -0.5 * sigmoid(-1.5) - 1.0, 0.5 * sigmoid(-1.5)),
]


@pytest.mark.parametrize(("name", "numbers", "loss", "d_real", "d_generated"), BY_HAND)
def test_value_and_gradient_by_hand(name: str, numbers: dict[str, Any], loss: float, d_real: float, d_generated: float) -> None:
    pair = example()
    gamma = {"gamma": 0.2} if PRESETS[name]["function"] in READ_BY["gamma"] else {}
    found = losses(pair, Objective(**{"name": name, "beta": 0.5} | gamma | numbers))
    found.loss_B.sum().backward()
    assert found.loss_B.item() == pytest.approx(loss, rel=1e-9)
    assert gradients(pair) == pytest.approx((d_real, d_generated), rel=1e-9)
    assert found.clamped_B.item() == 0


def test_every_preset_is_tested_by_hand_and_every_function_has_a_preset() -> None:
    assert {case[0] for case in BY_HAND} == set(PRESETS) == set(typing.get_args(PresetName))
    assert {preset["function"] for preset in PRESETS.values()} == set(OBJECTIVES) >= set(SMOOTHED)


def gradients(pair: Pair) -> tuple[float, float]:
    grads = [s.logps_B.grad for s in (pair.real, pair.generated)]
    return tuple(0.0 if grad is None else grad.item() for grad in grads)  # type: ignore[return-value]


def at(name: str, rho_real: float, rho_generated: float, dtype: torch.dtype = torch.float64, **numbers: Any) -> tuple[Pair, Losses]:
    """The loss at given log ratios of one-token responses under a reference of probability 1."""
    pair = Pair(side([rho_real], [0.0], [1]), side([rho_generated], [0.0], [1]))
    if dtype != torch.float64:
        pair = Pair(*(Side(*(t.detach().to(dtype) for t in s)) for s in pair[:2]))  # type: ignore[union-attr,arg-type]
        for s in pair[:2]:
            s.logps_B.requires_grad_()
    return pair, losses(pair, Objective(name=name, **numbers))


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("rho", [(-1e4, 1e4), (1e4, -1e4), (1e4, 1e4), (-1e4, -1e4)])
def test_loss_and_gradient_stay_finite_far_out_in_float32(name: str, rho: tuple[float, float]) -> None:
    pair, found = at(name, *rho, dtype=torch.float32, beta=1.0)
    assert torch.isfinite(found.loss_B).all()
    found.loss_B.sum().backward()
    assert all(math.isfinite(g) for g in gradients(pair))


def test_what_was_clamped_is_counted_and_keeps_its_gradient() -> None:
    pair, found = at("gsil_exponential", -20.0, 30.0, beta=1.0)
    assert found.clamped_B.item() == 2
    # The tangent at 10: e^10 (1 + x - 10).
    top = math.exp(MAX_EXPONENT)
    assert found.real_B.item() == pytest.approx(top * 11) and found.generated_B.item() == pytest.approx(top * 21)
    found.loss_B.sum().backward()
    assert gradients(pair) == pytest.approx((-top, top))
    assert at("gsil_kliep", -1e4, MAX_EXPONENT, beta=1.0)[1].clamped_B.item() == 0


RATIOS = st.floats(-30, 30)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "ipo"])
@given(rho_real=RATIOS, rho_generated=RATIOS)
def test_more_of_the_real_and_less_of_the_generated_never_costs(name: str, rho_real: float, rho_generated: float) -> None:
    pair, found = at(name, rho_real, rho_generated)
    found.loss_B.sum().backward()
    d_real, d_generated = gradients(pair)
    assert d_real <= 0 <= d_generated


@given(rho_real=RATIOS, rho_generated=RATIOS)
def test_ipo_pulls_the_difference_to_its_target(rho_real: float, rho_generated: float) -> None:
    pair, found = at("ipo", rho_real, rho_generated, beta=0.5)
    found.loss_B.sum().backward()
    assert gradients(pair) == pytest.approx((2 * (rho_real - rho_generated - 1), -2 * (rho_real - rho_generated - 1)))


PI_DATA = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03], dtype=torch.float64)
PI_REF = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)


def fitted(name: str, beta: float) -> torch.Tensor:
    """The tabular policy that minimises the expected loss over all pairs of five sequences, y_r ~ PI_DATA, y_g ~ PI_REF."""
    logits = PI_REF.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], lr=0.5, max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    real, generated = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    weights_B = (PI_DATA[:, None] * PI_REF[None, :]).flatten()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logps = logits.log_softmax(0)
        sides = [Side(logps[y], PI_REF.log()[y], torch.ones(25, dtype=torch.float64)) for y in (real.flatten(), generated.flatten())]
        loss = (weights_B * losses(Pair(*sides), Objective(name=name, beta=beta)).loss_B).sum()  # type: ignore[arg-type]
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0)


FINDERS = ["gsil_logistic", "gsil_kliep", "gsil_lsif", "gsil_brier", "gsil_exponential", "dil_lsif", "dil_ukl", "dil_bce"]
FINDERS += ["spin", "dpo", "fdpo_reverse_kl", "sft"]


@pytest.mark.parametrize("name", list(PRESETS))
def test_which_objectives_find_the_data_distribution(name: str) -> None:
    """Density-ratio losses fit pi = pi_ref * ratio, the pairwise logistic loss up to a constant that normalising takes away; margins,
    other divergences and losses without the reference fit something else."""
    # The exponential loss has half of the log density ratio as its optimal score: beta 1/2 fits the policy.
    policy = fitted(name, 0.5 if name == "gsil_exponential" else 1.0)
    error = ((policy - PI_DATA).abs() / PI_DATA).max().item()
    assert error < 0.02 if name in FINDERS else error > 0.1


def test_sft_weighs_every_sequence_alike() -> None:
    assert sft(side([-6.0, -2.0], [0.0, 0.0], [3, 1])).tolist() == [2.0, 2.0]


def test_occupancy_counts_early_tokens_more() -> None:
    # Token log-probs -1, -2, -3 of T = 3: (3 * -1 + 2 * -2 + 1 * -3) / 3, divided by |y| = 3.
    real = side([-6.0], [0.0], [3])._replace(occupancy_B=torch.tensor([(3 * -1 + 2 * -2 + 1 * -3) / 3], dtype=torch.float64))
    assert sft(real, "occupancy").item() == pytest.approx(10 / 9)


def test_a_preset_gives_numbers_that_a_person_may_change() -> None:
    assert Objective(name="dil_bce").model_dump() | {} == Objective(name="dil_bce", beta=1.0, length_normalised=True).model_dump()
    assert Objective(name="dil_bce", beta=0.3).beta == 0.3 and Objective(name="cpo").sft_weight == 1.0
    with pytest.raises(ValidationError, match=r"label_smoothing=0\.1 means nothing to gsil_brier"):
        Objective(name="gsil_brier", label_smoothing=0.1)
    with pytest.raises(ValidationError, match="greater than 0"):
        Objective(beta=0)
