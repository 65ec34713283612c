"""From rows of token ids to batches of tensors, and the order in which rows are seen.

A row is one prompt with its responses. The prompt is computed once: the row reads [prompt, response 1, response 2, ...], every
response sees the prompt and itself, and its positions continue the prompt's. Models whose attention cannot be given as a mask
(`shares_prompt`) get one row a response instead, with the same result.

Shapes: B rows, T positions, N response tokens of a batch, R responses of a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

TokenIds = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Example:
    """One prompt and its responses, as token ids, with what the reference policy gives them."""

    id: str
    prompt_ids: TokenIds
    responses: tuple[TokenIds, ...]
    ref_logps: tuple[float, ...] = ()
    """of the responses; empty where nobody asked a reference"""

    @property
    def tokens(self) -> int:
        """Tokens of the row when the prompt is counted once."""
        return len(self.prompt_ids) + sum(len(response) for response in self.responses)


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads."""

    input_ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    attention_mask: torch.Tensor
    """`[B, 1, T, T]` bool where responses share a prompt, else `[B, T]` of 0 and 1"""
    sources_N: torch.Tensor
    """flat index into B * T of the position that predicts a response token"""
    targets_N: torch.Tensor
    """the response token"""
    owners_N: torch.Tensor
    """the response that it belongs to"""
    occupancy_N: torch.Tensor
    """(T - k) / T for token k of a response of T tokens"""
    responses: int
    """R"""
    tokens: int
    """tokens that are not padding"""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)}
        return replace(self, **tensors)


def shares_prompt(config: Any) -> bool:
    """Whether a model's attention can be given as a `[B, 1, T, T]` mask.

    Args:
        config: a transformers config. Sliding windows, recurrent layers and position biases depend on a token's place in the
            row, not on its position id: such models get one row a response.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [])
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    # Measured by tests for these families; others take the safe way until somebody measures them.
    return text.model_type in {"llama", "qwen2", "qwen3", "mistral", "gemma", "smollm3", "gpt2", "gpt_neox"} and not (
        windowed or kinds - {"full_attention"}
    )


def collate(examples: Sequence[Example], pad_id: int, share_prompt: bool) -> Batch:
    """Lays rows out in tensors, padded on the right.

    Args:
        examples: B rows; the batch's responses are theirs in order: row 0's, then row 1's, ...
        pad_id: fills up rows; any valid token id, its value never matters.
        share_prompt: one row a prompt, with a mask; else one row a response.
    """
    rows = [(e.prompt_ids, e.responses) for e in examples]
    if not share_prompt:
        rows = [(prompt, (response,)) for prompt, responses in rows for response in responses]
    # A mask is needed only where a row branches; without one transformers takes its fastest causal path.
    branching = any(len(responses) > 1 for _, responses in rows)
    width = max(len(prompt) + sum(len(r) for r in responses) for prompt, responses in rows)
    input_ids_BT = np.full((len(rows), width), pad_id, dtype=np.int64)
    positions_BT = np.zeros((len(rows), width), dtype=np.int64)
    branch_BT = np.full((len(rows), width), -1, dtype=np.int64)
    sources, targets, owners, occupancy = [], [], [], []
    owner = 0
    for b, (prompt, responses) in enumerate(rows):
        end = len(prompt)
        input_ids_BT[b, :end] = prompt
        positions_BT[b, :end] = np.arange(end)
        branch_BT[b, :end] = 0
        for branch, response in enumerate(responses, start=1):
            start, end = end, end + len(response)
            input_ids_BT[b, start:end] = response
            positions_BT[b, start:end] = len(prompt) + np.arange(len(response))
            branch_BT[b, start:end] = branch
            # The first token is predicted by the prompt's last, the others by the one before.
            source = np.concatenate([[len(prompt) - 1], np.arange(start, end - 1)])[: len(response)]
            sources.append(b * width + source)
            targets.append(np.asarray(response, dtype=np.int64))
            owners.append(np.full(len(response), owner))
            occupancy.append(1 - np.arange(len(response), dtype=np.float32) / max(1, len(response)))
            owner += 1
    real_BT = branch_BT >= 0
    return Batch(
        input_ids_BT=torch.from_numpy(input_ids_BT),
        positions_BT=torch.from_numpy(positions_BT),
        attention_mask=_branch_mask(branch_BT) if branching else torch.from_numpy(real_BT.astype(np.int64)),
        sources_N=torch.from_numpy(np.concatenate(sources).astype(np.int64)),
        targets_N=torch.from_numpy(np.concatenate(targets)),
        owners_N=torch.from_numpy(np.concatenate(owners).astype(np.int64)),
        occupancy_N=torch.from_numpy(np.concatenate(occupancy)),
        responses=owner,
        tokens=int(real_BT.sum()),
    )


def _branch_mask(branch_BT: np.ndarray) -> torch.Tensor:
    """`[B, 1, T, T]`: a token sees what stands before it in the prompt (branch 0) and in its own branch."""
    branch = torch.from_numpy(branch_BT)
    same_BTT = branch[:, :, None] == branch[:, None, :]
    prompt_BTT = branch[:, None, :] == 0
    causal_TT = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool).tril()
    # Padding sees padding (branch -1), so that no row of the softmax is empty.
    return ((same_BTT | prompt_BTT) & causal_TT)[:, None]


def batch_order(rows: int, batch_size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Row indices of every step: each epoch is a fresh seeded permutation, cut in batches; the last may be smaller."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        yield from (order[start : start + batch_size] for start in range(0, rows, batch_size))


def deal(batch: np.ndarray, lengths: np.ndarray, max_tokens: int, rank: int, world: int) -> list[np.ndarray]:
    """A worker's micro-batches of one global batch: rows of similar lengths, so that little is padded and all have as much to do.

    Args:
        batch: row indices of the global batch.
        lengths: tokens of every row of the data set.
        max_tokens: of one micro-batch of one worker, with padding; a longer row goes alone.
        rank: of this worker.
        world: number of workers.

    Returns:
        as many micro-batches for every worker; where rows run out, the last of some workers is empty.
    """
    by_length = batch[np.argsort(-lengths[batch], kind="stable")]
    parts, start = [], 0
    while start < len(by_length):
        rows = max(1, max_tokens // int(lengths[by_length[start]]))
        parts.append(by_length[start : start + rows * world][rank::world])
        start += rows * world
    return parts
