"""A job of two iterations without a model: what there is to watch of a run, in seconds. `GSIL_STUB_SECONDS` is what a row takes."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from actors.settings import Pool
from jobs import runner
from jobs.schemas import JobConfig
from pipelines.policy_training import newest
from pipelines.run.artifacts import Run, Stage, write_json
from pipelines.tables import Shown
from pipelines.workers.shards import Shard, map_shards

ROWS, STEPS, ITERATIONS = 6, 4, 2
Numbers = dict[str, dict[str, Any]]


def seconds() -> float:
    return float(os.environ.get("GSIL_STUB_SECONDS", "0.05"))


class StubConfig(JobConfig):
    script: ClassVar[str] = "tests/support/stub_job.py"


class Graph:
    def __init__(self) -> None:
        self.data = Stage("demonstrations", {})
        self.iterations = []
        for t in range(1, ITERATIONS + 1):
            negatives = Stage(f"iteration-{t}/negatives", {"iteration": t}, {"data": self.data})
            self.iterations.append((negatives, Stage(f"iteration-{t}/training", {"steps": STEPS, "seed": t}, {"negatives": negatives})))

    def stages(self) -> list[Stage]:
        return [self.data, *(stage for pair in self.iterations for stage in pair)]


def read(run: Run, stages: tuple[Stage, ...]) -> Numbers:
    (run.directory(stages[0]) / "rows.jsonl").write_text("{}\n" * ROWS)
    return {stages[0].name: {"train": ROWS, "rejected": 3}}


class SampleShards:
    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        time.sleep(options["seconds"])
        Path(output).write_text(inputs[0])


def sample(run: Run, stages: tuple[Stage, ...]) -> Numbers:
    folder, options = run.directory(stages[0]), {"seconds": seconds()}
    shards = [Shard(stages[0], (f"{row}",), folder / "train" / f"{row}.txt", options, 1) for row in range(ROWS)]
    return map_shards(run, shards, SampleShards, {}, Pool(), {})


def train(run: Run, stages: tuple[Stage, ...]) -> Numbers:
    metrics = run.directory(stages[0]) / "metrics.jsonl"
    done, also = lambda: int(newest(metrics).get("step", 0)), lambda: {"tokens_per_second": newest(metrics).get("tokens_per_second", 0)}
    run.display.follow(STEPS, "steps", done, also)
    for step in range(done() + 1, STEPS + 1):
        time.sleep(seconds())
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "steps": STEPS, "tokens_per_second": 100.0 * step}) + "\n")
    return {}


def plan(config: StubConfig) -> Graph:
    return Graph()


def work(config: StubConfig, graph: Graph, run: Run) -> dict[str, Any]:
    run.do(read, graph.data)
    for negatives, training in graph.iterations:
        run.do(sample, negatives)
        run.do(train, training)
    content = {"run": run.root.name, "stages": run.log, "stopped": None, "warnings": []}
    write_json(run.root / "summary.json", content)
    return content


def show(content: dict[str, Any], root: Path) -> Shown:
    return Shown([], [f"done: {root}"])


if __name__ == "__main__":
    sys.exit(runner.main(StubConfig, sys.argv[1:], __doc__ or "", plan, work, show))
