"""Demonstrations in every format, and the stage that reads them."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import base_model, demonstrations
from pipelines.run.artifacts import Run, Stage, write_json
from pipelines.settings import Demonstrations

ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(30)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "\n".join(json.dumps(row) for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table_writer = csv.DictWriter(file, list(rows[0]))
            table_writer.writeheader()
            table_writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def prepare(tmp_path: Path, tokenizer: Path, **settings: Any) -> tuple[Run, Stage, dict[str, Any]]:
    """Runs the stage on a base stage that is there already."""
    run = Run(tmp_path / "run")
    base = Stage("base/model", {})

    def there(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        write_json(run.directory(base) / "source.json", {"weights": str(tokenizer)})
        (run.directory(base) / "tokenizer").symlink_to(tokenizer)
        return {}

    run.do(there, base)
    assert base_model.tokenizer(run, base)
    options = Demonstrations(**{"max_prompt_tokens": 64, "max_tokens": 96, "shard_rows": 8} | settings)
    stage = demonstrations.plan(options, base)
    run.do(demonstrations.prepare(options, False), stage)
    return run, stage, run.numbers(stage)
