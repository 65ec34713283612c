"""Layout of rows in tensors, the order of rows, and log-probs against a plain float64 computation."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from models import config, write_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from actors.learner.batches import Example, batch_order, collate, deal, shares_prompt
from actors.learner.logprobs import CHUNK_TOKENS, ResponseLogProbs
from actors.scorer import batches_by_length

EXAMPLES = [
    Example("a", [0, 10, 11, 12], ([20, 21, 1], [30, 31, 32, 33, 1])),
    Example("b", [0, 13], ([22, 1], [34])),
    Example("c", [0, 14, 15, 16, 17, 18], ([23, 24, 25, 26, 1], [35, 36, 1])),
]


def plain_logp(model: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
    """Token by token, in float64, no batching, no padding."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0]
    table = torch.log_softmax(logits, dim=-1)
    return sum(table[len(prompt) - 1 + k, token].item() for k, token in enumerate(response))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral_window"])
@pytest.mark.parametrize("share", [True, False])
def test_log_probs_equal_a_plain_float64_computation(family: str, share: bool, tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / family, family, std=0.2)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="sdpa").eval()
    share = share and shares_prompt(model.config)
    got = ResponseLogProbs(model)(collate(EXAMPLES, pad_id=1, share_prompt=share))[0].tolist()
    want = [plain_logp(model, list(e.prompt_ids), list(r)) for e in EXAMPLES for r in e.responses]
    assert got == pytest.approx(want, abs=1e-4)


def test_which_families_share_a_prompt(tmp_path: Path) -> None:
    kinds = {family: shares_prompt(config(family, 300)) for family in ("llama", "qwen2", "gpt2", "mistral_window")}
    assert kinds == {"llama": True, "qwen2": True, "gpt2": True, "mistral_window": False}
    assert not shares_prompt(AutoConfig.for_model("mamba"))


def test_occupancy_counts_token_k_of_t_as_t_minus_k_over_t(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64, attn_implementation="sdpa").eval()
    prompt, response = [0, 10, 11], [20, 21, 1]
    tokens = [plain_logp(model, prompt, response[: k + 1]) - plain_logp(model, prompt, response[:k]) for k in range(3)]
    got = ResponseLogProbs(model)(collate([Example("a", prompt, (response,))], pad_id=1, share_prompt=True))[1]
    assert got.tolist() == pytest.approx([tokens[0] + tokens[1] * 2 / 3 + tokens[2] / 3], abs=1e-4)


def test_padding_and_company_change_nothing(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64, attn_implementation="sdpa").eval()
    module = ResponseLogProbs(model)
    together = module(collate(EXAMPLES, pad_id=1, share_prompt=True))[0].tolist()
    for pad_id in (0, 2, model.config.vocab_size - 1):
        assert module(collate(EXAMPLES, pad_id=pad_id, share_prompt=True))[0].tolist() == pytest.approx(together, abs=1e-5)
    alone = [value for e in EXAMPLES for value in module(collate([e], pad_id=1, share_prompt=True))[0].tolist()]
    assert alone == pytest.approx(together, abs=1e-5)


def test_gradients_do_not_depend_on_the_layout_or_the_chunks(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = []
    for share, chunk in ((True, CHUNK_TOKENS), (False, CHUNK_TOKENS), (True, 3)):
        monkeypatch.setattr("actors.learner.logprobs.CHUNK_TOKENS", chunk)
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="sdpa")
        (ResponseLogProbs(model)(collate(EXAMPLES, 1, share))[0] * torch.arange(1.0, 7.0)).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, atol=2e-4, rtol=1e-3)


def test_the_mask_lets_a_response_see_the_prompt_and_itself() -> None:
    batch = collate([Example("a", [5, 6], ([7, 8], [9]))], pad_id=0, share_prompt=True)
    rows = ["10000", "11000", "11100", "11110", "11001"]
    assert ["".join(str(int(v)) for v in row) for row in batch.attention_mask[0, 0]] == rows
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.sources_N.tolist() == [1, 2, 1] and batch.targets_N.tolist() == [7, 8, 9] and batch.owners_N.tolist() == [0, 0, 1]
    assert batch.tokens == 5 and batch.responses == 2


def test_every_epoch_sees_every_row_once_in_its_own_order() -> None:
    steps = list(batch_order(rows=10, batch_size=4, epochs=2, seed=3))
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(steps[:3]), np.concatenate(steps[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    again = batch_order(rows=10, batch_size=4, epochs=2, seed=3)
    assert all((a == b).all() for a, b in zip(again, steps, strict=True))


@pytest.mark.parametrize(("rows", "world", "max_tokens"), [(8, 2, 30), (5, 2, 40), (1, 4, 5), (7, 3, 1000), (9, 1, 1)])
def test_dealing_gives_each_row_to_one_worker_within_the_tokens(rows: int, world: int, max_tokens: int) -> None:
    batch, lengths = np.arange(rows) + 3, np.arange(20)[::-1].copy()
    dealt = [deal(batch, lengths, max_tokens, rank, world) for rank in range(world)]
    assert len({len(parts) for parts in dealt}) == 1, "as many micro-batches for every worker"
    assert sorted(itertools.chain.from_iterable(np.concatenate(parts) for parts in dealt)) == sorted(batch)
    assert all(len(p) <= 1 or len(p) * lengths[p].max() <= max_tokens for parts in dealt for p in parts)
    loads = [sum(int(lengths[p].sum()) for p in parts) for parts in dealt]
    assert max(loads) - min(loads) <= lengths[batch].max()


def test_scoring_batches_stay_within_their_tokens() -> None:
    lengths = [5, 9, 2, 30, 7, 7]
    batches = list(batches_by_length(lengths, max_tokens=20))
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(6))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 20 for b in batches)
