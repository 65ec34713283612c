"""The sampler in transformers: the same tokens as `model.generate`, ends, and draws that do not depend on the batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.learner.batches import Example
from actors.sampler import Sampler, choose, uniform
from actors.scorer import Scorer
from actors.settings import Engine, Sampling, Scoring

PROMPTS = [[0, 20, 30, 40, 50], [0, 60], [0, 70, 80, 90], [0, 61]]
END = 1


def sampler(model: Path, at_once: int = 256, stop_ids: tuple[int, ...] = (END,)) -> Sampler:
    return Sampler(str(model), Engine(backend="transformers", dtype="float32", max_num_seqs=at_once), 64, stop_ids)


def test_greedy_gives_the_tokens_of_generate_whatever_is_padded_beside(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ours = sampler(tiny)(PROMPTS, Sampling(greedy=True, max_new_tokens=12), seed=0)
    for ids, (response,) in zip(PROMPTS, ours, strict=True):
        whole = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=END, pad_token_id=2)
        assert response.ids == whole[0, len(ids) :].tolist()
        assert response.finish_reason == ("stop" if response.ids[-1] == END else "length")


def test_a_response_ends_with_the_first_token_that_ends_it(tiny: Path) -> None:
    (free,) = sampler(tiny)(PROMPTS[:1], Sampling(max_new_tokens=12), seed=3)[0]
    stop = free.ids[4]
    (cut,) = sampler(tiny, stop_ids=(END, stop))(PROMPTS[:1], Sampling(max_new_tokens=12), seed=3)[0]
    assert cut.ids == free.ids[: free.ids.index(stop) + 1] and cut.finish_reason == "stop"
    assert len(free.ids) == 12 and free.finish_reason == "length"


def test_samples_depend_on_seed_and_place_and_not_on_the_batch(tiny: Path) -> None:
    sampling = Sampling(samples=3, max_new_tokens=8)
    together = sampler(tiny)(PROMPTS, sampling, seed=5)
    told: list[int] = []
    apart = sampler(tiny, at_once=2)(PROMPTS, sampling, 5, told.append)
    assert together == apart and told == [2, 4, 6, 8, 10, 12]
    assert len({tuple(r.ids) for r in together[0]}) == 3 and sampler(tiny)(PROMPTS, sampling, seed=6) != together


def test_draws_follow_the_probabilities_of_the_learners_own_forward_pass(tiny: Path) -> None:
    """The first token of 2,000 samples against the exact probabilities: chi-squared over the tokens that are expected often."""
    drawn = sampler(tiny)(PROMPTS[:1], Sampling(samples=2000, max_new_tokens=1, temperature=0.1), seed=0)[0]
    counts = np.bincount([response.ids[0] for response in drawn], minlength=300)
    tokens = np.flatnonzero(counts > 20)[:5]
    logps = np.array(Scorer(str(tiny), Scoring(), "float32")([Example("a", PROMPTS[0], tuple([int(t)] for t in tokens))])[0])
    ours = np.log(counts[tokens] / counts[tokens[0]])
    assert ours == pytest.approx((logps - logps[0]) / 0.1, abs=5 / np.sqrt(counts[tokens].min()))


def test_a_number_chooses_the_token_whose_share_it_falls_in() -> None:
    logits_BV = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]]))
    assert choose(logits_BV, Sampling(greedy=True), None).tolist() == [0, 0, 1]
    draw_B = torch.tensor([0.49, 0.51, 0.99], dtype=torch.float64)
    assert choose(logits_BV, Sampling(), draw_B).tolist() == [0, 1, 2]
    # The nucleus of 0.6 is the two likeliest; their shares are 5/8 and 3/8.
    assert choose(logits_BV, Sampling(top_p=0.6), torch.tensor([0.62, 0.63, 0.99], dtype=torch.float64)).tolist() == [0, 1, 2]
    assert uniform(1, 2, 3, 4).tolist() == uniform(1, 2, 3, 9)[:4].tolist() != uniform(1, 2, 4, 4).tolist()


def test_a_prompt_without_room_is_said(tiny: Path) -> None:
    with pytest.raises(ValueError, match="a prompt of 64 tokens leaves no room"):
        sampler(tiny)([[0] * 64], Sampling(greedy=True), 0)
