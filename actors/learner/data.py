"""Rows of a training stage, read from parquet by index; token ids stay in Arrow buffers until a batch needs them."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.learner.batches import Example

SIDES = {"response_ids": None, "real_ids": "ref_logp_real", "generated_ids": "ref_logp_generated"}
"""Columns of responses and of their reference log-probs, in the order of an Example."""
MISMATCHED = ("mismatched_ids", "ref_logp_mismatched")
"""A response to another prompt, where the objective wants one (KTO)."""


class Examples:
    """Demonstrations (one response) or pairs (the real and the generated one), by row number.

    Args:
        paths: parquet files in order, with `id, prompt_ids` and either `response_ids` or
            `real_ids, generated_ids` and, where log ratios are wanted, `ref_logp_real, ref_logp_generated`.
    """

    def __init__(self, paths: Sequence[str]):
        self.table: pa.Table = pa.concat_tables([pq.read_table(path, columns=_columns(path)) for path in paths]).combine_chunks()
        names = self.table.column_names
        self.responses = ["real_ids", "generated_ids"] if "real_ids" in names else ["response_ids"]
        # None of SFT and of rewards.
        self.references = [ref for name in self.responses if (ref := SIDES[name]) and ref in names]
        self.prompt_lengths = _lengths(self.table, "prompt_ids")
        """`[rows]`: tokens of each prompt"""
        responses = [_lengths(self.table, name) for name in self.responses]
        self.lengths = sum(responses, self.prompt_lengths)
        """`[rows]`: tokens of each row, the prompt counted once"""
        self.padded = len(responses) * (self.prompt_lengths + np.max(responses, axis=0))
        """`[rows]`: the same with one row a response, as long as the longest"""

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> Example:
        return self._example(row, self.responses, self.references)

    def cost(self, share_prompt: bool) -> np.ndarray:
        """`[rows]`: tokens that go through the model, see `Example.cost`."""
        return self.lengths if share_prompt else self.padded

    def mismatched(self, row: int) -> Example:
        """The row's prompt with a response to another one."""
        return self._example(row, [MISMATCHED[0]], [MISMATCHED[1]])

    def _example(self, row: int, responses: Sequence[str], refs: Sequence[str]) -> Example:
        def ids(name: str) -> np.ndarray:
            return self.table.column(name)[row].values.to_numpy(zero_copy_only=False)

        return Example(
            id=self.table.column("id")[row].as_py(),
            prompt_ids=ids("prompt_ids"),
            responses=tuple(ids(name) for name in responses),
            ref_logps=tuple(self.table.column(name)[row].as_py() for name in refs),
        )


def _columns(path: str) -> list[str]:
    wanted = ["id", "prompt_ids", *SIDES, *filter(None, SIDES.values()), *MISMATCHED]
    present = pq.read_schema(path).names
    return [name for name in wanted if name in present]


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name)
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks] or [np.zeros(0, np.int64)])
