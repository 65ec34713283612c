"""Attention over packed rows whose responses share their prompt.

    packed sequence   | prompt A | A's response 1 | A's response 2 | prompt B | ...
    branch            |    0     |       1        |       2        |    0     |

A token sees what stands before it in its own branch and in the prompt (branch 0) of its row. transformers calls
`branching_attention` in every layer, under the name BRANCHING; the kernels are torch's.

Shapes: T positions of the packed sequence, H heads, D size of a head.
"""

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

BRANCHING = "branching"
FLOAT32_KEYS = 256
"""Up to which attention on a CPU is computed in float32; see `_attend`."""


@dataclass(frozen=True)
class Branches:
    """Where rows and branches of a packed sequence begin and end."""

    bounds: tuple[tuple[int, ...], ...]
    """of every row: its start, the end of its prompt, the end of each response"""
    row_T: torch.Tensor
    branch_T: torch.Tensor
    masks: dict[Any, Any] = field(default_factory=dict, compare=False)
    """made once and used by every layer"""

    def to(self, device: torch.device | str) -> "Branches":
        """The same on another device."""
        return Branches(self.bounds, self.row_T.to(device), self.branch_T.to(device))

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of the pieces that attend together: of every row the prompt with its first response, then each later response."""
        edges = [(row[0], *row[2:]) if len(row) > 2 else row for row in self.bounds]
        return [end - start for row in edges for start, end in itertools.pairwise(row)]

    def mask(self, prompt: int, response: int, device: torch.device) -> torch.Tensor:
        """`[response, prompt + response]` bool: a later response sees all of the prompt and what it wrote so far."""
        if (prompt, response) not in self.masks:
            causal = torch.ones(response, prompt + response, dtype=torch.bool, device=device).tril(prompt)
            self.masks[prompt, response] = causal
        return self.masks[prompt, response]

    def rule(self) -> Any:
        """The rule as a function of (batch, head, query, key), for FlexAttention: whether the one token sees the other."""

        def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            branch = self.branch_T[key]
            return (self.row_T[query] == self.row_T[key]) & (query >= key) & ((branch == 0) | (branch == self.branch_T[query]))

        return sees


def branching_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    branches: Branches | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers.

    Args:
        module: the attention layer.
        query: `[1, H, T, D]`.
        key: `[1, H', T, D]`, H a multiple of H'.
        value: as `key`.
        attention_mask: unused where there are branches.
        scaling: of the logits; 1 / sqrt(D) by default.
        branches: of the packed sequence; without them this is transformers' own causal attention.
        kwargs: for that.

    Returns:
        `[1, T, H, D]` and no weights.
    """
    if branches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if query.is_cuda:
        return _flex(query, key, value, scaling, branches).transpose(1, 2).contiguous(), None
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    # Split once: the gradient of a slice would be a tensor of the whole sequence, full of zeros, for every row.
    pieces = zip(*(x.split(branches.lengths, dim=2) for x in (query, key, value)), strict=True)
    parts = []
    for start, prompt, *ends in branches.bounds:
        # The prompt and the first response are an ordinary causal sequence; each later response looks back at the prompt.
        query, key, value = next(pieces)
        parts.append(_attend(query, key, value, is_causal=True, scale=scaling))
        prompts = [x[:, :, : prompt - start] for x in (key, value)]
        for begin, end in itertools.pairwise(ends):
            query, *own = next(pieces)
            key, value = (torch.cat(pair, dim=2) for pair in zip(prompts, own, strict=True))
            mask = branches.mask(prompt - start, end - begin, query.device)
            parts.append(_attend(query, key, value, attn_mask=mask, scale=scaling))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """torch's kernel, in float32 where few keys are seen: there its backward pass takes half the time that it takes in bfloat16 (2
    cores of an AMD EPYC, 9 heads of 64: 1.6 against 3.8 ms at 86 tokens, 8.4 against 11 at 250, 26 against 23 at 460)."""
    if query.dtype.itemsize > 2 or key.shape[2] > FLOAT32_KEYS:
        return F.scaled_dot_product_attention(query, key, value, **options)
    return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), **options).to(query.dtype)


def _flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, branches: Branches) -> torch.Tensor:
    """The whole packed sequence in one call; blocks of the mask that nobody sees are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    if "blocks" not in branches.masks:
        length = query.shape[2]
        branches.masks["blocks"] = create_block_mask(branches.rule(), None, None, length, length, device=query.device)
    gqa = query.shape[1] != key.shape[1]
    return _compiled_flex()(query, key, value, block_mask=branches.masks["blocks"], scale=scaling, enable_gqa=gqa)


_compiled: list[Any] = []


def _compiled_flex() -> Any:
    if not _compiled:
        from torch.nn.attention.flex_attention import flex_attention

        _compiled.append(torch.compile(flex_attention, dynamic=True))
    return _compiled[0]


AttentionInterface.register(BRANCHING, branching_attention)
