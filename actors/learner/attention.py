"""Attention over packed rows whose responses share their prompt, and with it all that they begin with alike.

    packed sequence   | prompt A, response 1 | rest of response 2 | rest of response 3 | prompt B, response 1 | ...
    piece             |          0           |         1          |         2          |          3           |

A row is a tree of tokens, laid out depth first: what a response begins with as another one did is there once. A token sees those on
its way from the root. transformers calls `branching_attention` in every layer, under the name BRANCHING; the kernels are torch's.

Shapes: T positions of the packed sequence, H heads, D size of a head.
"""

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
    """The pieces of a packed sequence, and what each looks back at."""

    lengths: tuple[int, ...]
    """tokens of each piece: the first of a row is its prompt with a response, the others are what responses add"""
    paths: tuple[tuple[tuple[int, int], ...], ...]
    """of each piece: the pieces that it continues, from the root, and how many tokens of each are on its way"""
    until_T: torch.Tensor
    """of each token: the end of what continues it, so that token q sees token k where k <= q < until[k]"""
    masks: dict[Any, Any] = field(default_factory=dict, compare=False)
    """made once and used by every layer"""

    def to(self, device: torch.device | str) -> "Branches":
        """The same on another device."""
        return Branches(self.lengths, self.paths, self.until_T.to(device))

    def mask(self, before: int, own: int, device: torch.device) -> torch.Tensor:
        """`[own, before + own]` bool: a piece sees all of its way and what it wrote so far."""
        if (before, own) not in self.masks:
            self.masks[before, own] = torch.ones(own, before + own, dtype=torch.bool, device=device).tril(before)
        return self.masks[before, own]

    def rule(self) -> Any:
        """The rule as a function of (batch, head, query, key), for FlexAttention: whether the one token sees the other."""

        def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return (key <= query) & (query < self.until_T[key])

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
    queries, keys, values = (x.split(branches.lengths, dim=2) for x in (query, key, value))
    parts = []
    for number, path in enumerate(branches.paths):
        query, key, value = queries[number], keys[number], values[number]
        if not path:
            parts.append(_attend(query, key, value, is_causal=True, scale=scaling))
            continue
        key, value = (torch.cat([*(x[piece][:, :, :seen] for piece, seen in path), x[number]], dim=2) for x in (keys, values))
        mask = branches.mask(key.shape[2] - query.shape[2], query.shape[2], query.device)
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
