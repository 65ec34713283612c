"""Schemas of the rows on disk. Shards are parquet files; the k-th shard of a stage holds what it made of the k-th of its input."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from actors.storage import WriteError, patiently, write_bytes
from pipelines.run.artifacts import StageError

T = TypeVar("T")

SEAL = "gsil:xxh3"
"""Key in a shard's footer of the checksum of the file: a shard that was finished by an attempt that was killed stands in no manifest."""
NO_SEAL = "0" * 16
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
"""`reason` says why a response has no score."""


def shards(directory: Path) -> list[Path]:
    """The shards of a directory in order."""
    return sorted(directory.glob("*.parquet"))


def spread(items: Sequence[T], count: int) -> list[T]:
    """As many of them, or all, evenly from the first on, in their order."""
    count = min(count, len(items))
    return [items[k * len(items) // count] for k in range(count)]


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
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({SEAL: NO_SEAL})
    try:
        write_bytes(path, sealed(sink.getvalue().to_pybytes()))
    except WriteError as error:
        raise StageError(error.strerror) from error
    return table.num_rows


def sealed(file: bytes) -> bytes:
    """A parquet file with its own checksum in its footer, computed with zeros in the checksum's place."""
    start = _seal_at(file)
    assert file[start : start + len(NO_SEAL)] == NO_SEAL.encode()
    return file[:start] + xxhash.xxh3_64_hexdigest(file).encode() + file[start + len(NO_SEAL) :]


def intact(path: Path) -> bool:
    """Whether a file of `write_rows` is, to the bit, what was written."""
    file = patiently(f"reading {path}", path.read_bytes)
    start = _seal_at(file)
    end = start + len(NO_SEAL)
    return start >= 0 and file[start:end] == xxhash.xxh3_64_hexdigest(file[:start] + NO_SEAL.encode() + file[end:]).encode()


def _seal_at(file: bytes) -> int:
    """Where in a parquet file its checksum stands; negative if nowhere."""
    found = file.rfind(SEAL.encode())
    # Between key and value Thrift puts a type and a length, a byte each.
    return found + len(SEAL) + 2 if found >= 0 else -1


def sum_counts(paths: Iterable[Path]) -> dict[str, int]:
    """The counts of `write_rows` over files, and their `rows`."""
    total = {"rows": 0}
    for path in paths:
        total["rows"] += pq.read_metadata(path).num_rows
        for key, value in (pq.read_schema(path).metadata or {}).items():
            total[key.decode()] = total.get(key.decode(), 0) + int(value)
    return total
