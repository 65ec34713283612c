"""The main job with stubs where models are: its rows, files, stages, driver and Ray are the real ones, and it takes seconds.

python tests/support/stub_gsil.py [the options of jobs/gsil_iterative.py]
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs import runner
from jobs.gsil_iterative import align, plan
from jobs.schemas import GsilConfig
from pipelines import base_model, generation, policy_training, reference
from pipelines.records import PAIR, SAMPLE, write_rows
from pipelines.run.artifacts import Run, Stage

PAUSE = 0.03
"""Seconds a row."""


class Samples:
    """Says something that depends on the policy's file and on the row."""

    def __init__(self, weights: str, **others: Any):
        self.policy = Path(weights, "model.safetensors").read_bytes()

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        rows = pq.read_table(inputs[0], columns=["id", "prompt", "prompt_ids"]).slice(options["first"], options["prompts"]).to_pylist()
        made = []
        for row in rows:
            time.sleep(PAUSE)
            drawn = list(hashlib.sha256(self.policy + row["id"].encode()).digest()[:6])
            said = {"iteration": options["iteration"], "sample": 0, "response": str(drawn), "response_ids": drawn, "finish_reason": "stop"}
            made.append(row | said)
            tell(len(made))
        write_rows(Path(output), made, SAMPLE, {"truncated": 0})


class Scores:
    """Reference log-probs that depend on the row."""

    def __init__(self, **others: Any):
        pass

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        real = {row["id"]: row for row in pq.read_table(inputs[0]).to_pylist()}
        pairs = []
        for row in pq.read_table(inputs[-1]).to_pylist():
            time.sleep(PAUSE)
            ids = {"real_ids": real[row["id"]]["response_ids"], "generated_ids": row["response_ids"]}
            logps = {"ref_logp_real": -1.0, "ref_logp_generated": -float(sum(row["response_ids"]))}
            pairs.append({key: row[key] for key in ("id", "iteration", "sample", "prompt_ids")} | ids | logps)
            tell(len(pairs))
        write_rows(Path(output), pairs, PAIR, {"identical": 0, "dropped": 0})


def train(*_: Any) -> Any:
    """Work of training stages: the policy is a hash of the rows that it was trained on."""

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        for stage in stages:
            policy = run.directory(stage) / "policy"
            policy.mkdir(exist_ok=True)
            rows = [row for path in sorted((run.directory(stage.inputs["data"]) / "train").glob("*.parquet")) for row in _ids(path)]
            time.sleep(1)
            source = Path(base_model.weights(run, stage.inputs["start"]), "model.safetensors").read_bytes()
            (policy / "model.safetensors").write_bytes(hashlib.sha256(source + json.dumps(rows).encode()).digest())
        return {}

    return work


def _ids(path: Path) -> list[Any]:
    table = pq.read_table(path)
    return [table[name].to_pylist() for name in table.column_names if name.endswith("_ids")]


if __name__ == "__main__":
    generation.SampleShards, reference.ScoreShards, policy_training.train = Samples, Scores, train  # type: ignore[misc,assignment]
    sys.exit(runner.main(GsilConfig, sys.argv[1:], __doc__ or "", plan, align))
