"""Rows of a training stage, read from parquet by index; token ids stay in Arrow buffers until a batch needs them."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.learner.batches import Example


class Examples:
    """Demonstrations (one response) or pairs (the real and the generated one), by row number.

    Args:
        paths: parquet files in order, with `id, prompt_ids` and either `response_ids` or
            `real_ids, generated_ids, ref_logp_real, ref_logp_generated`.
    """

    def __init__(self, paths: Sequence[str]):
        self.table: pa.Table = pa.concat_tables([pq.read_table(path, columns=_columns(path)) for path in paths]).combine_chunks()
        self.response_columns = ["real_ids", "generated_ids"] if "real_ids" in self.table.column_names else ["response_ids"]
        self.lengths = sum((_lengths(self.table, name) for name in ["prompt_ids", *self.response_columns]), np.zeros(len(self), np.int64))
        """`[rows]`: tokens of each row, the prompt counted once"""

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> Example:
        def ids(name: str) -> np.ndarray:
            return self.table.column(name)[row].values.to_numpy(zero_copy_only=False)

        paired = len(self.response_columns) == 2
        return Example(
            id=self.table.column("id")[row].as_py(),
            prompt_ids=ids("prompt_ids"),
            responses=tuple(ids(name) for name in self.response_columns),
            ref_logps=tuple(self.table.column(name)[row].as_py() for name in ("ref_logp_real", "ref_logp_generated")) if paired else (),
        )


def _columns(path: str) -> list[str]:
    wanted = ["id", "prompt_ids", "response_ids", "real_ids", "generated_ids", "ref_logp_real", "ref_logp_generated"]
    present = pq.read_schema(path).names
    return [name for name in wanted if name in present]


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name)
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks] or [np.zeros(0, np.int64)])
