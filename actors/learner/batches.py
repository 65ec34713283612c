"""From rows of token ids to batches of tensors, and the order in which rows are seen.

A row is one prompt with its responses. Where the model allows it (`shares_prompt`), the prompt is computed once and rows are packed one
after the other without padding: [prompt, response 1, response 2][prompt, ...]; every response sees its prompt and itself, and its
positions continue the prompt's. What responses begin with alike is computed once, too: a third of the tokens of 64 samples of an
arithmetic prompt. Other models get one padded row a response, with the same result.

Shapes: B rows of the model's input (1 where packed), T positions, N response tokens of a batch, R responses of a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from actors.learner.attention import Branches
from actors.prefixes import common

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
        share_prompt: pack rows and compute each prompt, and what responses begin with alike, once; else one row a response, padded on
            the right.
    """
    sequences = [np.concatenate([e.prompt_ids, response]).astype(np.int64) for e in examples for response in e.responses]
    prompts = [len(e.prompt_ids) for e in examples for _ in e.responses]
    if share_prompt:
        packed = _Packed()
        places = [place for example in examples for place in packed.row(example)]
        shape, branches = (1, packed.at), packed.branches()
    else:
        width = max(map(len, sequences))
        places = [number * width + np.arange(len(ids)) for number, ids in enumerate(sequences)]
        shape, branches = (len(sequences), width), None
    ids_BT, positions_BT, mask_BT = np.full(shape, pad_id), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for place, ids in zip(places, sequences, strict=True):
        # Places are flat indices into B * T.
        ids_BT.ravel()[place], positions_BT.ravel()[place], mask_BT.ravel()[place] = ids, np.arange(len(ids)), 1
    lengths = [len(ids) - prompt for ids, prompt in zip(sequences, prompts, strict=True)]
    fractions = [1 - np.arange(length, dtype=np.float32) / max(1, length) for length in lengths]
    # The first token of a response is predicted by the prompt's last, the others by the one before.
    sources = [place[prompt - 1 : -1] for place, prompt in zip(places, prompts, strict=True)]
    return Batch(
        input_ids_BT=torch.from_numpy(ids_BT),
        positions_BT=torch.from_numpy(positions_BT),
        attention_mask=None if share_prompt else torch.from_numpy(mask_BT),
        branches=branches,
        sources_N=torch.from_numpy(np.concatenate(sources)),
        targets_N=torch.from_numpy(np.concatenate([ids[prompt:] for ids, prompt in zip(sequences, prompts, strict=True)])),
        owners_N=torch.from_numpy(np.repeat(np.arange(len(sequences)), lengths)),
        occupancy_N=torch.from_numpy(np.concatenate(fractions)),
        ends_R=torch.tensor([place[-1] for place in places]),
        responses=len(sequences),
        tokens=sum(example.tokens for example in examples) if share_prompt else int(mask_BT.sum()),
    )


class _Packed:
    """A packed sequence that grows by rows; see `actors.learner.attention`."""

    def __init__(self) -> None:
        self.at = 0
        self.lengths: list[int] = []
        self.paths: list[tuple[tuple[int, int], ...]] = []
        self.until: list[np.ndarray] = []

    def row(self, example: Example) -> list[np.ndarray]:
        """Adds a row; returns for each response the places of its tokens, those of the prompt first."""
        start = self.at
        until_T = np.zeros(example.tokens, dtype=np.int64)
        found: dict[int, np.ndarray] = {}
        path: list[tuple[int, int]] = []
        before: list[int] = []
        place_T = np.zeros(0, dtype=np.int64)
        prompt, *responses = (np.asarray(ids).tolist() for ids in (example.prompt_ids, *example.responses))
        # In this order the response before is the one with which most is shared.
        for number in sorted(range(len(responses)), key=responses.__getitem__):
            ids = prompt + responses[number]
            shared = common(before, ids)
            until_T[place_T[shared:] - start] = self.at
            path = _cut(path, shared)
            own = len(ids) - shared
            place_T = np.concatenate([place_T[:shared], self.at + np.arange(own)])
            if own:
                self.paths.append(tuple(path))
                path.append((len(self.lengths), own))
                self.lengths.append(own)
                self.at += own
            found[number], before = place_T, ids
        until_T[place_T - start] = self.at
        self.until.append(until_T[: self.at - start])
        return [found[number] for number in range(len(responses))]

    def branches(self) -> Branches:
        """The pieces."""
        return Branches(tuple(self.lengths), tuple(self.paths), torch.from_numpy(np.concatenate(self.until)))


def _cut(path: list[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """The first tokens of a way."""
    kept = []
    for piece, length in path:
        if tokens:
            kept.append((piece, min(length, tokens)))
            tokens -= min(length, tokens)
    return kept


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
