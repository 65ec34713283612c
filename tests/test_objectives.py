"""Objectives against numbers computed by hand."""

import math
import typing

import pytest
import torch

from actors.learner.objectives import OBJECTIVES, Side, logistic, sft
from actors.settings import Objective


def side(logps: list[float], refs: list[float], lengths: list[int]) -> Side:
    return Side(
        torch.tensor(logps, dtype=torch.float64, requires_grad=True), torch.tensor(refs, dtype=torch.float64), torch.tensor(lengths)
    )


def test_logistic_by_hand() -> None:
    # f_r = 0.5 * (-3 + 5) + 0.2 = 1.2, f_g = 0.5 * (-4 + 3) + 0.2 = -0.3
    losses = logistic(side([-3.0], [-5.0], [2]), side([-4.0], [-3.0], [3]), Objective(beta=0.5, gamma=0.2))
    assert losses.real_B.item() == pytest.approx(math.log1p(math.exp(-1.2)), rel=1e-12)
    assert losses.generated_B.item() == pytest.approx(math.log1p(math.exp(-0.3)), rel=1e-12)


def test_logistic_at_step_0_is_2_ln_2() -> None:
    losses = logistic(side([-7.0], [-7.0], [4]), side([-9.0], [-9.0], [4]), Objective(beta=0.1, gamma=0.0))
    assert (losses.real_B + losses.generated_B).item() == pytest.approx(2 * math.log(2), rel=1e-12)


def test_logistic_gradient_is_the_classifiers_error() -> None:
    real, generated = side([-3.0], [-5.0], [2]), side([-4.0], [-3.0], [3])
    losses = logistic(real, generated, Objective(beta=0.5, gamma=0.2))
    (losses.real_B + losses.generated_B).sum().backward()
    # d softplus(-f)/d logp = -beta * sigmoid(-f); d softplus(f)/d logp = beta * sigmoid(f)
    assert real.logps_B.grad is not None and generated.logps_B.grad is not None
    assert real.logps_B.grad.item() == pytest.approx(-0.5 / (1 + math.exp(1.2)), rel=1e-12)
    assert generated.logps_B.grad.item() == pytest.approx(0.5 / (1 + math.exp(0.3)), rel=1e-12)


@pytest.mark.parametrize("ratio", [-1e4, 1e4])
def test_logistic_stays_finite_far_out(ratio: float) -> None:
    losses = logistic(side([ratio], [0.0], [1]), side([-ratio], [0.0], [1]), Objective(beta=1.0))
    assert torch.isfinite(losses.real_B).all() and torch.isfinite(losses.generated_B).all()
    assert (losses.real_B + losses.generated_B).item() == pytest.approx(max(0.0, -2 * ratio))


def test_sft_weighs_every_sequence_alike() -> None:
    assert sft(side([-6.0, -2.0], [0.0, 0.0], [3, 1])).tolist() == [2.0, 2.0]


def test_every_name_in_the_settings_is_in_the_table() -> None:
    assert set(typing.get_args(Objective.model_fields["name"].annotation)) == set(OBJECTIVES)
