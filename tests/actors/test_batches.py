"""Layout of rows in tensors, the order of rows, and log-probs against a plain float64 computation."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import config, write_tiny
from transformers import AutoModelForCausalLM

from actors.learner import attention, policy
from actors.learner.attention import BRANCHING, branching_attention
from actors.learner.batches import Example, batch_order, collate, deal, shares_prompt
from actors.learner.logprobs import CHUNK_TOKENS, ResponseLogProbs, SelectedLogSoftmax
from actors.scorer import batches_by_length

EXAMPLES = [
    Example("a", [0, 10, 11, 12], ([20, 21, 1], [20, 31, 32, 33, 1])),
    Example("b", [0, 13], ([22, 1], [34])),
    Example("c", [0, 14, 15, 16, 17, 18], ([23, 24, 25, 26, 1], [35, 36, 1])),
]


SHARING = ["llama", "qwen2", "qwen3", "smollm3", "gpt2", "gpt_neox", "gemma", "mistral"]
FAMILIES = [*SHARING, "mistral_window"]
NOT_KNOWN = ["bloom", "mamba"]
"""ALiBi, and recurrent layers."""
LONGEST = 11
"""Tokens of the longest prompt with a response in EXAMPLES; the second Mistral's window has 8."""


def plain_logp(model: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
    """Token by token, in float64, no batching, no padding."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0]
    table = torch.log_softmax(logits, dim=-1)
    return sum(table[len(prompt) - 1 + k, token].item() for k, token in enumerate(response))


@pytest.mark.parametrize("float32_keys", [0, 256])
def test_so_they_do_in_bfloat16_whatever_attention_is_computed_in(float32_keys: int, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "FLOAT32_KEYS", float32_keys)
    seen = set()
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        seen.add(query.dtype)
        return kernel(query, *others, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16, attn_implementation=BRANCHING).eval()
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16, attn_implementation="eager").double().eval()
    got = ResponseLogProbs(model)(collate(EXAMPLES, pad_id=1, share_prompt=True))[0].tolist()
    assert seen == {torch.float32 if float32_keys else torch.bfloat16}
    want = [plain_logp(plain, list(e.prompt_ids), list(r)) for e in EXAMPLES for r in e.responses]
    assert got == pytest.approx(want, rel=0.02, abs=0.2)


@pytest.mark.parametrize("family", [*FAMILIES, *NOT_KNOWN])
@pytest.mark.parametrize("share", [True, False])
def test_log_probs_equal_a_plain_float64_computation(family: str, share: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the learner's own precision and attention, as it loads a policy."""
    directory = write_tiny(tmp_path / family, family, std=0.2)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval()
    share = share and shares_prompt(plain.config, LONGEST)
    monkeypatch.setattr(policy, "shares_prompt", lambda *_: share)
    model = policy.load(str(directory), "float32", LONGEST, False).eval()
    got = ResponseLogProbs(model)(collate(EXAMPLES, pad_id=1, share_prompt=share))[0].tolist()
    want = [plain_logp(plain, list(e.prompt_ids), list(r)) for e in EXAMPLES for r in e.responses]
    assert got == pytest.approx(want, abs=1e-3)


def test_which_families_share_a_prompt(tmp_path: Path) -> None:
    kinds = {family: shares_prompt(config(family, 300), LONGEST) for family in (*FAMILIES, *NOT_KNOWN)}
    assert kinds == {family: family in SHARING for family in kinds}
    window = config("mistral_window", 300)
    assert shares_prompt(window, 8) and not shares_prompt(window, 9), "a window as long as the longest row hides nothing"


def test_occupancy_counts_token_k_of_t_as_t_minus_k_over_t(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64, attn_implementation=BRANCHING).eval()
    prompt, response = [0, 10, 11], [20, 21, 1]
    tokens = [plain_logp(model, prompt, response[: k + 1]) - plain_logp(model, prompt, response[:k]) for k in range(3)]
    got = ResponseLogProbs(model)(collate([Example("a", prompt, (response,))], pad_id=1, share_prompt=True))[1]
    assert got.tolist() == pytest.approx([tokens[0] + tokens[1] * 2 / 3 + tokens[2] / 3], abs=1e-4)


def test_padding_and_company_change_nothing(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64, attn_implementation=BRANCHING).eval()
    module = ResponseLogProbs(model)
    together = module(collate(EXAMPLES, pad_id=1, share_prompt=True))[0].tolist()
    for pad_id in (0, 2, model.config.vocab_size - 1):
        assert module(collate(EXAMPLES, pad_id=pad_id, share_prompt=True))[0].tolist() == pytest.approx(together, abs=1e-5)
    alone = [value for e in EXAMPLES for value in module(collate([e], pad_id=1, share_prompt=True))[0].tolist()]
    assert alone == pytest.approx(together, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_does_not_count_either(family: str, tmp_path: Path) -> None:
    """Nothing here pads on the left; whoever lays out a batch so gets the same log-probs."""
    model = AutoModelForCausalLM.from_pretrained(write_tiny(tmp_path / family, family, std=0.2), dtype=torch.float64).eval()
    right = collate(EXAMPLES, pad_id=1, share_prompt=False)
    assert right.attention_mask is not None
    counts_B = right.attention_mask.sum(dim=1)
    width = right.input_ids_BT.shape[1]
    left_BT = [torch.roll(x, width - int(n)) for x, n in zip(right.input_ids_BT, counts_B, strict=True)]
    mask_BT = [torch.roll(x, width - int(n)) for x, n in zip(right.attention_mask, counts_B, strict=True)]
    positions_BT = [torch.roll(x, width - int(n)) for x, n in zip(right.positions_BT, counts_B, strict=True)]
    left = replace(
        right,
        input_ids_BT=torch.stack(left_BT),
        attention_mask=torch.stack(mask_BT),
        positions_BT=torch.stack(positions_BT),
        sources_N=right.sources_N + (width - counts_B)[right.owners_N],
    )
    module = ResponseLogProbs(model)
    assert module(left)[0].tolist() == pytest.approx(module(right)[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_do_not_depend_on_the_layout_or_the_chunks(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_tiny(tmp_path / family, family, std=0.2)
    values, grads = [], []
    for share, chunk in ((True, CHUNK_TOKENS), (False, CHUNK_TOKENS), (True, 3)):
        monkeypatch.setattr("actors.learner.logprobs.CHUNK_TOKENS", chunk)
        model = policy.load(str(directory), "float32", None, False)
        logps_R = ResponseLogProbs(model)(collate(EXAMPLES, 1, share and shares_prompt(model.config)))[0]
        loss = (logps_R * torch.arange(1.0, 7.0)).sum()
        loss.backward()
        values.append(loss.item())
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert values[1:] == pytest.approx(values[:1] * 2, rel=1e-5)
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, atol=2e-4, rtol=1e-3)


def test_a_response_sees_its_prompt_and_itself() -> None:
    batch = collate([Example("a", [5, 6], ([7, 8], [9])), Example("b", [4], ([3],))], pad_id=0, share_prompt=True)
    assert batch.branches
    at = torch.arange(7)
    rows = ["1000000", "1100000", "1110000", "1111000", "1100100", "0000010", "0000011"]
    assert ["".join(str(int(v)) for v in row) for row in batch.branches.rule()(0, 0, at[:, None], at[None, :])] == rows
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 8, 9, 4, 3]] and batch.positions_BT.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert batch.sources_N.tolist() == [1, 2, 1, 5] and batch.targets_N.tolist() == [7, 8, 9, 3] and batch.owners_N.tolist() == [0, 0, 1, 2]
    assert (batch.branches.lengths, batch.branches.paths) == ((4, 1, 2), ((), ((0, 2),), ())) and (batch.tokens, batch.responses) == (7, 3)


def test_what_responses_begin_with_alike_is_computed_once() -> None:
    #            0  1  2  3  4  5   6      7  8
    # packed     5 [7  8  3][9  1] [8]... in the order of their tokens: a tree, depth first
    responses: tuple[list[int], ...] = ([8], [7, 8, 3], [7, 9], [], [7, 8, 3], [7, 9, 1])
    batch = collate([Example("a", [5], responses), Example("b", [7], ([8],))], pad_id=0, share_prompt=True)
    assert batch.branches
    assert batch.input_ids_BT.tolist() == [[5, 7, 8, 3, 9, 1, 8, 7, 8]] and batch.positions_BT.tolist() == [[0, 1, 2, 3, 2, 3, 1, 0, 1]]
    assert batch.branches.lengths == (1, 3, 1, 1, 1, 2)
    assert batch.branches.paths == ((), ((0, 1),), ((0, 1), (1, 1)), ((0, 1), (1, 1), (2, 1)), ((0, 1),), ())
    assert batch.branches.until_T.tolist() == [7, 6, 4, 4, 6, 6, 7, 9, 9]
    assert batch.ends_R.tolist() == [6, 3, 4, 0, 3, 5, 8], "of equal ones the same"
    assert batch.sources_N.tolist() == [0, 0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 4, 7]
    assert batch.targets_N.tolist() == [8, 7, 8, 3, 7, 9, 7, 8, 3, 7, 9, 1, 8] and batch.tokens == 15


def test_the_rule_for_gpus_is_the_one_for_cpus() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    branches = collate(EXAMPLES, pad_id=0, share_prompt=True).branches
    assert branches
    length = len(branches.until_T)
    query, key, value = (torch.randn(1, heads, length, 16) for heads in (4, 2, 2))
    ours, _ = branching_attention(torch.nn.Module(), query, key, value, None, branches=branches)
    mask = create_block_mask(branches.rule(), None, None, length, length, device="cpu")
    flex = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(ours, flex.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_log_softmax_of_targets_and_its_gradient() -> None:
    logits, targets = torch.randn(5, 7, dtype=torch.float64).requires_grad_(), torch.tensor([0, 6, 3, 3, 1])
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    (SelectedLogSoftmax.apply(logits, targets) * weights).sum().backward()
    ours, logits.grad = logits.grad, None
    (logits.log_softmax(1)[torch.arange(5), targets] * weights).sum().backward()
    torch.testing.assert_close(ours, logits.grad, atol=1e-5, rtol=1e-5)


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
    whole = [deal(batch, lengths, max_tokens, rank, world) for rank in range(world)]
    longest = [[part.longest for part in parts] for parts in whole]
    assert all(seen == longest[0] for seen in longest), "whoever recomputes activations does so beside all others"
    dealt = [[part.rows for part in parts] for parts in whole]
    assert len({len(parts) for parts in dealt}) == 1, "as many micro-batches for every worker"
    assert all(lengths[p].max(initial=0) <= most for parts in dealt for p, most in zip(parts, longest[0], strict=True))
    assert sorted(itertools.chain.from_iterable(np.concatenate(parts) for parts in dealt)) == sorted(batch)
    assert all(len(p) <= 1 or len(p) * lengths[p].max() <= max_tokens for parts in dealt for p in parts)
    loads = [sum(int(lengths[p].sum()) for p in parts) for parts in dealt]
    assert max(loads) - min(loads) <= lengths[batch].max()


def test_scoring_batches_stay_within_their_tokens() -> None:
    lengths = [5, 9, 2, 30, 7, 7]
    batches = list(batches_by_length(lengths, max_tokens=20))
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(6))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 20 for b in batches)
