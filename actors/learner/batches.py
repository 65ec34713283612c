"""From rows of token ids to batches of tensors, and the order in which rows are seen.

A row is one prompt with its responses. Where the model allows it (`shares_prompt`), the prompt is computed once and rows are packed one
after the other without padding: [prompt, response 1, response 2][prompt, ...]; every response sees its prompt and itself, and its
positions continue the prompt's. Other models get one padded row a response, with the same result.

Shapes: B rows of the model's input (1 where packed), T positions, N response tokens of a batch, R responses of a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from actors.learner.attention import Branches

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

    def cost(self, share_prompt: bool) -> int:
        """Tokens that go through the model: the prompt once, or as many rows as responses, padded to the longest."""
        longest = max(len(response) for response in self.responses)
        return self.tokens if share_prompt else len(self.responses) * (len(self.prompt_ids) + longest)


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads."""

    input_ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    attention_mask: torch.Tensor | None
    """`[B, T]` of 0 and 1 where rows are padded"""
    branches: Branches | None
    """where rows are packed"""
    sources_N: torch.Tensor
    """flat index into B * T of the position that predicts a response token"""
    targets_N: torch.Tensor
    """the response token"""
    owners_N: torch.Tensor
    """the response that it belongs to"""
    occupancy_N: torch.Tensor
    """(T - k) / T for token k of a response of T tokens"""
    ends_R: torch.Tensor
    """flat index of every response's last token"""
    responses: int
    """R"""
    tokens: int
    """tokens that are not padding"""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, torch.Tensor | Branches)}
        return Batch(**(values | moved))


def shares_prompt(config: Any, longest: int | None = None) -> bool:
    """Whether a model's responses can share their prompt in a packed row.

    Args:
        config: a transformers config. Sliding windows, recurrent layers and position biases depend on a token's place in the
            row, not on its position id: such models get one row a response.
        longest: no prompt with one of its responses is longer, tokens. A window as long as that hides nothing.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [])
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    hides = window is not None and (longest is None or longest > window)
    # Measured by tests for these families; others take the safe way until somebody measures them.
    known = text.model_type in {"llama", "qwen2", "qwen3", "mistral", "gemma", "smollm3", "gpt2", "gpt_neox"}
    return known and not hides and not kinds - {"full_attention", "sliding_attention"}


def collate(examples: Sequence[Example], pad_id: int, share_prompt: bool) -> Batch:
    """Lays rows out in tensors.

    Args:
        examples: the batch's responses are theirs in order: those of the first row, then those of the second, ...
        pad_id: fills up rows; any valid token id, its value never matters.
        share_prompt: pack rows and compute each prompt once; else one row a response, padded on the right.
    """
    # (place in the flat input of the prompt and of each response)
    if share_prompt:
        starts = np.cumsum([0, *(example.tokens for example in examples)])
        shape = (1, int(starts[-1]))
        places = [(int(start), _ends(int(start), e)[:-1]) for start, e in zip(starts, examples, strict=False)]
    else:
        width = max(len(e.prompt_ids) + len(r) for e in examples for r in e.responses)
        shape = (sum(len(e.responses) for e in examples), width)
        places = []
    ids_T, positions_T = np.full(shape, pad_id, dtype=np.int64).ravel(), np.zeros(shape, dtype=np.int64).ravel()
    row_T, branch_T = np.zeros(shape, dtype=np.int64).ravel(), np.full(shape, -1, dtype=np.int64).ravel()
    sources, targets, owners, occupancy, ends = [], [], [], [], []
    owner = 0
    for number, example in enumerate(examples):
        length = len(example.prompt_ids)
        for branch, response in enumerate(example.responses, start=1):
            prompt, start = (places[number][0], places[number][1][branch - 1]) if share_prompt else (owner * width, owner * width + length)
            if branch == 1 or not share_prompt:
                ids_T[prompt : prompt + length] = example.prompt_ids
                positions_T[prompt : prompt + length] = np.arange(length)
                row_T[prompt : prompt + length], branch_T[prompt : prompt + length] = number, 0
            end = start + len(response)
            ids_T[start:end] = response
            positions_T[start:end] = length + np.arange(len(response))
            row_T[start:end], branch_T[start:end] = number, branch
            # The first token is predicted by the prompt's last, the others by the one before.
            sources.append(np.concatenate([[prompt + length - 1], np.arange(start, end - 1)])[: len(response)])
            targets.append(np.asarray(response, dtype=np.int64))
            owners.append(np.full(len(response), owner))
            ends.append(end - 1 if len(response) else prompt + length - 1)
            occupancy.append(1 - np.arange(len(response), dtype=np.float32) / max(1, len(response)))
            owner += 1
    branches = None
    if share_prompt:
        bounds = tuple((start, *_ends(start, e)) for (start, _), e in zip(places, examples, strict=True))
        branches = Branches(bounds, torch.from_numpy(row_T), torch.from_numpy(branch_T))
    return Batch(
        input_ids_BT=torch.from_numpy(ids_T.reshape(shape)),
        positions_BT=torch.from_numpy(positions_T.reshape(shape)),
        attention_mask=None if share_prompt else torch.from_numpy((branch_T >= 0).astype(np.int64).reshape(shape)),
        branches=branches,
        sources_N=torch.from_numpy(np.concatenate(sources).astype(np.int64)),
        targets_N=torch.from_numpy(np.concatenate(targets)),
        owners_N=torch.from_numpy(np.concatenate(owners).astype(np.int64)),
        occupancy_N=torch.from_numpy(np.concatenate(occupancy)),
        ends_R=torch.tensor(ends),
        responses=owner,
        tokens=int((branch_T >= 0).sum()),
    )


def _ends(start: int, example: Example) -> tuple[int, ...]:
    """Where a packed row's prompt and each of its responses end."""
    lengths = [len(example.prompt_ids), *(len(response) for response in example.responses)]
    return tuple(int(end) for end in start + np.cumsum(lengths))


def batch_order(rows: int, batch_size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Row indices of every step: each epoch is a fresh seeded permutation, cut in batches; the last may be smaller."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        yield from (order[start : start + batch_size] for start in range(0, rows, batch_size))


class Dealt(NamedTuple):
    """A micro-batch of one worker."""

    rows: np.ndarray
    """of the data set"""
    longest: int
    """tokens of the longest row that any worker has at this place: what follows from it is the same for all"""


def deal(batch: np.ndarray, lengths: np.ndarray, max_tokens: int, rank: int, world: int) -> list[Dealt]:
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
        longest = int(lengths[by_length[start]])
        rows = max(1, max_tokens // longest)
        parts.append(Dealt(by_length[start : start + rows * world][rank::world], longest))
        start += rows * world
    return parts
