"""Attention over packed rows whose responses share their prompt.

    packed sequence   | prompt A | A's response 1 | A's response 2 | prompt B | ...
    branch            |    0     |       1        |       2        |    0     |

A token sees what stands before it in its own branch and in the prompt (branch 0) of its row. transformers calls
`branching_attention` in every layer, under the name BRANCHING; the kernels are torch's.

Shapes: T positions of the packed sequence, H heads, D size of a head.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

BRANCHING = "branching"


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
    parts = [_row(query, key, value, scaling, bounds, branches) for bounds in branches.bounds]
    return torch.cat([part for row in parts for part in row], dim=2).transpose(1, 2), None


def _row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, bounds: tuple[int, ...], branches: Branches
) -> list[torch.Tensor]:
    """One row: the prompt and the first response are an ordinary causal sequence; each later response looks back at the prompt."""
    start, prompt, *ends = bounds
    end = ends[0] if ends else prompt
    q, k, v = (x[:, :, start:end] for x in (query, key, value))
    made = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)]
    for begin, end in itertools.pairwise(ends):
        k, v = (torch.cat([x[:, :, start:prompt], x[:, :, begin:end]], dim=2) for x in (key, value))
        mask = branches.mask(prompt - start, end - begin, query.device)
        made.append(F.scaled_dot_product_attention(query[:, :, begin:end], k, v, attn_mask=mask, scale=scaling))
    return made


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
