"""How the flow of rows grows: engines, prompts, iterations. The engines are stubs that answer at a fixed rate; all around them is real.

    python benchmarks/scaling.py [--engines 1 2 4 8 16] [--prompts 10000 100000 1000000] [--iterations 100] [--plot scaling.png]

- engines: every engine answers 32 prompts a second; the time from the first shard's begin to the last one's end, when all have started,
  against prompts / (32 x engines).
- prompts: two engines that answer at once: seconds a row, the most memory that the driver ever held (its peak, imports
  included), and the most that any one engine held behind a shard.
- iterations: `--dry-run` of a run directory in which so many are done.

Logical CPUs: as many as engines, whatever the machine has. Engines that sleep need none.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from train_step import cpu_name

from actors.generator import Response
from actors.settings import Engine, Pool, Sampling
from pipelines.generation import SampleShards, _tasks, plan
from pipelines.records import DEMONSTRATION, write_rows
from pipelines.run.artifacts import Run, Stage, write_json
from pipelines.workers.shards import map_shards

RATE = 32.0
"""Prompts a second of a stub."""
SHARD_ROWS = 256
SHARDS_AN_ENGINE = 4
RESPONSE = [*range(100, 160), 2]


class Stub(SampleShards):
    """The real actor with an engine that answers at a fixed rate, and an account of when and with how much memory."""

    def __init__(self, rate: float | None, account: str):
        self.rate, self.account = rate, Path(account)
        self.chat = self  # type: ignore[assignment]
        self.weights = ""
        self.generator = self.answer

    def text(self, ids: Sequence[int]) -> str:
        """What a tokenizer would say."""
        return " ".join(map(str, ids))

    def answer(self, prompts: Sequence[Any], sampling: Sampling, seed: int, tell: Callable[[int], None]) -> list[list[Response]]:
        """Takes its time."""
        for made in range(0, len(prompts), 32):
            if self.rate:
                time.sleep(min(32, len(prompts) - made) / self.rate)
            tell(made)
        return [[Response(RESPONSE, "stop")] for _ in prompts]

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        """One shard."""
        began = time.time()
        super().__call__(inputs, output, options, tell)
        process = psutil.Process()
        entry = {"began": began, "ended": time.time(), "pid": process.pid, "bytes": process.memory_info().rss}
        with (self.account / f"{process.pid}.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")


def main() -> None:
    """Prints a table of each kind, and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompts", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores of {cpu_name()}")
    growth, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        for engines in options.engines:
            prompts = engines * SHARDS_AN_ENGINE * SHARD_ROWS
            found = child(Path(folder) / f"engines-{engines}", engines, prompts, SHARD_ROWS, RATE)
            growth.append(found | {"of_linear": prompts / (RATE * engines) / found["seconds"]})
            print(f"{engines:9,} engines  {prompts / found['seconds']:7.1f} prompts/s  {growth[-1]['of_linear']:.3f} of linear", flush=True)
        for prompts in options.prompts:
            found = child(Path(folder) / f"prompts-{prompts}", 2, prompts, 2048, None)
            rows.append(found)
            print(
                f"{prompts:9,} prompts  {found['seconds'] / prompts * 1e6:5.1f} us a row  driver {found['driver'] / 2**20:,.0f} MiB, "
                f"an engine {found['engine'] / 2**20:,.0f} MiB at most",
                flush=True,
            )
        print(f"{options.iterations:9,} iterations  --dry-run {planning(Path(folder), options.iterations):.2f} s")
    if options.plot:
        draw(growth, rows, options.plot)


def child(root: Path, engines: int, prompts: int, shard_rows: int, rate: float | None) -> dict[str, Any]:
    """Runs a stage in a process of its own."""
    root.mkdir()
    told = json.dumps({"root": str(root), "engines": engines, "prompts": prompts, "shard_rows": shard_rows, "rate": rate})
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import scaling; scaling.stage(**{json.loads(told)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"engines": engines, "prompts": prompts} | json.loads((root / "found.json").read_text())


def stage(root: str, engines: int, prompts: int, shard_rows: int, rate: float | None) -> None:
    """Samples `prompts` prompts with stubs; leaves what it took in found.json."""
    import ray

    # Ray's workers cannot import this file: the stub travels with the task.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address="local", num_cpus=engines, include_dashboard=False, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # What is measured begins when all engines are there.
    context.wait_for_min_actors_s = 600
    run, data, base = Run(Path(root)), Stage("demonstrations", {}), Stage("base", {})
    demonstrations(run.directory(data) / "train", prompts, shard_rows)
    sampled = plan("negatives", base, base, data, Sampling(), Engine(), 1, {"train": None})
    account = Path(root, "account")
    account.mkdir()
    map_shards(
        run, _tasks(run, sampled, ""), Stub, {"rate": rate, "account": str(account)}, Pool(min_actors=engines, max_actors=engines), {}
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    entries = [json.loads(line) for file in account.glob("*.jsonl") for line in file.read_text().splitlines()]
    # The driver looks at the rows once more when a stage ends, as `generation.sample` does.
    seconds = max(entry["ended"] for entry in entries) - min(entry["began"] for entry in entries)
    assert sum(pq.read_metadata(path).num_rows for path in run.directory(sampled).glob("*/*.parquet")) == prompts
    write_json(Path(root, "found.json"), {"seconds": seconds, "driver": peak, "engine": max(entry["bytes"] for entry in entries)})
    ray.shutdown()


def demonstrations(folder: Path, rows: int, shard_rows: int) -> None:
    """Shards of prompts; all full ones are one file with many names."""
    folder.mkdir(parents=True)

    def write(path: Path, count: int) -> None:
        prompt = [{"role": "user", "content": "word " * 60}]
        row = {"source": "stub", "prompt": prompt, "response": "word", "prompt_ids": list(range(100, 160)), "response_ids": [100, 2]}
        write_rows(path, ({"id": str(number)} | row for number in range(count)), DEMONSTRATION)

    first = folder / "00000.parquet"
    write(first, min(rows, shard_rows))
    for number in range(1, rows // shard_rows):
        (folder / f"{number:05d}.parquet").hardlink_to(first)
    if rows > shard_rows and rows % shard_rows:
        write(folder / f"{rows // shard_rows:05d}.parquet", rows % shard_rows)


def planning(folder: Path, iterations: int) -> float:
    """Median seconds of `--dry-run` in a run directory whose iterations are all done."""
    from jobs.config import build
    from jobs.gsil_iterative import plan as graph
    from jobs.schemas import GsilConfig

    flags = ["--run.root", str(folder), "--run.name", "many", "--iterations.count", str(iterations)]
    stages = graph(build(GsilConfig, flags)).stages()
    for made in stages:
        (folder / "many" / made.name).mkdir(parents=True)
        manifest = {"name": made.name, "fingerprint": made.fingerprint, "files": {}, "numbers": {}, "seconds": 1.0}
        manifest["inputs"] = {role: {"name": given.name, "fingerprint": given.fingerprint} for role, given in made.inputs.items()}
        write_json(folder / "many" / made.name / "manifest.json", manifest)
    times = []
    for _ in range(5):
        began = time.monotonic()
        argv = [sys.executable, "jobs/gsil_iterative.py", *flags, "--dry-run"]
        told = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
        times.append(time.monotonic() - began)
        assert told.count("  done ") == len(stages)
    return statistics.median(times)


def draw(growth: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    """Both curves as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    engines = [found["engines"] for found in growth]
    left.plot(engines, [RATE * count for count in engines], color="#999999", linestyle="--", label="linear")
    left.plot(engines, [found["prompts"] / found["seconds"] for found in growth], color="#0072b2", marker="o", label="measured")
    left.set(xscale="log", yscale="log", xlabel="engines", ylabel="prompts a second", title="Engines that answer 32 prompts a second")
    left.set_xticks(engines, [str(count) for count in engines])
    left.legend(frameon=False)
    prompts = [found["prompts"] for found in rows]
    for who, colour in (("driver", "#0072b2"), ("engine", "#d55e00")):
        right.plot(prompts, [found[who] / 2**20 for found in rows], color=colour, marker="o", label=f"{who}'s memory")
    right.set(xscale="log", ylim=(0, None), xlabel="prompts", ylabel="MiB", title="Memory against the length of a stage")
    right.legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
