"""From float32 to bfloat16, by hand: neighbours, and right in the mean."""

from typing import Any

import pytest
import torch

from actors.learner.policy import DTYPES, _rounded
from actors.learner.rounding import stochastic
from actors.settings import Training


def test_a_number_becomes_its_neighbours_as_often_as_it_is_near_them() -> None:
    # Steps of bfloat16 are 2^-7 between 1 and 2, and 2^-8 below 1.
    low, high = 1.0, 1.0 + 2**-7
    for share in (0.25, 0.9):
        for sign in (1.0, -1.0):
            number = sign * (low + share * 2**-7)
            rounded = stochastic(torch.full((40_000,), number), torch.Generator().manual_seed(0))
            assert rounded.dtype == torch.bfloat16 and set(rounded.tolist()) == {sign * low, sign * high}
            assert rounded.double().mean().item() == pytest.approx(number, abs=5 * 2**-7 * 0.5 / 200)


def test_what_bfloat16_holds_stays_what_it_is() -> None:
    held = torch.tensor([0.0, -0.0, 1.0, -1.5, 3.0e38, 1e-40, float("inf"), float("-inf")]).bfloat16().float()
    for seed in range(20):
        assert torch.equal(stochastic(held, torch.Generator().manual_seed(seed)).float(), held)
    assert stochastic(torch.tensor([float("nan")]), torch.Generator()).isnan().all()


def test_small_updates_of_many_weights_are_kept_in_the_sum() -> None:
    draw = torch.Generator().manual_seed(1)
    before = torch.randn(64, 4096, generator=draw).bfloat16().float()
    # A tenth of half a step: to the nearest, nearly all of it is lost.
    update = before.abs() * 2**-8 * 0.1
    after = before + update
    kept = [(rounded.float() - before).sum().item() / update.sum().item() for rounded in (after.bfloat16(), stochastic(after, draw))]
    assert kept[0] < 0.05 and kept[1] == pytest.approx(1.0, abs=0.05)
    assert torch.equal(stochastic(after, torch.Generator().manual_seed(2)), stochastic(after, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("settings", [{"precision": "bfloat16"}, {"precision": "bfloat16", "lora_r": 4}, {"precision": "float32"}])
def test_tied_weights_stay_one_tensor(settings: dict[str, Any]) -> None:
    embedding, norm = torch.randn(8, 4), torch.randn(4)
    state = {"embed.weight": embedding, "norm.weight": norm, "lm_head.weight": embedding, "other.weight": embedding}
    saved = _rounded(state, Training(**settings), 0, {"lm_head.weight": "embed.weight"})
    assert saved["lm_head.weight"].data_ptr() == saved["embed.weight"].data_ptr() != saved["norm.weight"].data_ptr()
    # What shares memory without being declared as tied would be refused.
    assert saved["other.weight"].data_ptr() != saved["embed.weight"].data_ptr() and torch.equal(
        saved["other.weight"], saved["embed.weight"]
    )
    assert all(tensor.dtype == DTYPES[settings["precision"]] for tensor in saved.values())
