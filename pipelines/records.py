"""Schemas of the rows on disk. Shards are parquet files; the k-th shard of a stage holds what it made of the k-th of its input."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts import replacing

IDS = pa.list_(pa.int32())
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

DEMONSTRATION = pa.schema(
    {"id": pa.string(), "source": pa.string(), "prompt": MESSAGES, "response": pa.string(), "prompt_ids": IDS, "response_ids": IDS}
)
PREFERENCE = DEMONSTRATION.append(pa.field("rejected", pa.string())).append(pa.field("rejected_ids", IDS))
REJECTED = pa.schema({"source": pa.string(), "reason": pa.string(), "row": pa.string()})
SAMPLE = pa.schema(
    {
        "id": pa.string(),
        "iteration": pa.int32(),
        "sample": pa.int32(),
        "prompt": MESSAGES,
        "response": pa.string(),
        "prompt_ids": IDS,
        "response_ids": IDS,
        "finish_reason": pa.string(),
    }
)
PAIR = pa.schema(
    {
        "id": pa.string(),
        "iteration": pa.int32(),
        "sample": pa.int32(),
        "prompt_ids": IDS,
        "real_ids": IDS,
        "generated_ids": IDS,
        "ref_logp_real": pa.float64(),
        "ref_logp_generated": pa.float64(),
        # A response to another prompt, where the objective wants one (KTO); else null.
        "mismatched_ids": IDS,
        "ref_logp_mismatched": pa.float64(),
    }
)

REWARD_PAIR = pa.schema({"id": pa.string(), "sample": pa.int32(), "prompt_ids": IDS, "real_ids": IDS, "generated_ids": IDS})
SCORE = pa.schema({"id": pa.string(), "sample": pa.int32(), "score": pa.float64(), "reason": pa.string()})
"""Of a response that has no score, `reason` says why."""


def shards(directory: Path) -> list[Path]:
    """The shards of a directory in order."""
    return sorted(directory.glob("*.parquet"))


def uncut(path: Path) -> str:
    """Name of the shard of prompts whose samples a file holds: many samples of one shard are cut into several files,
    `00000-00512.parquet` for those from its row 512 on."""
    return path.stem.partition("-")[0] + path.suffix


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema, counts: Mapping[str, int] | None = None) -> int:
    """Writes a parquet file whole or not at all; returns its rows.

    Args:
        path: the file.
        rows: in order.
        schema: one of this module.
        counts: what was left out on the way and why; kept in the file's footer, see `sum_counts`.
    """
    footer = {key: str(value) for key, value in (counts or {}).items()}
    table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata(footer))
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return table.num_rows


def sum_counts(paths: Iterable[Path]) -> dict[str, int]:
    """The counts of `write_rows` over files, and their `rows`."""
    total = {"rows": 0}
    for path in paths:
        total["rows"] += pq.read_metadata(path).num_rows
        for key, value in (pq.read_schema(path).metadata or {}).items():
            total[key.decode()] = total.get(key.decode(), 0) + int(value)
    return total
