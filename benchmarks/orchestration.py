"""What a run costs beside its work: the wall time of the main job over what its stages are there for.

    python benchmarks/orchestration.py [--config jobs/configs/quickstart.yaml] [any flag of the job]

Runs the job in a fresh run directory. Work is what the manifests say: the time in which the busiest engine sampled or the busiest scorer
scored, and in which workers took steps and measured held-out pairs. All else is cost: processes, imports, the reading and writing of
weights, Ray, checksums, the report. Then, by arithmetic from the same costs, what they are of the published run on 62,000 prompts.
"""

import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train_step import ROOT, cpu_name, matmul_peak

from pipelines.run.manifests import read_json

sys.path.append(str(ROOT))
from deploy import sizing

KINDS = {
    "samples": "generation",
    "negatives": "generation",
    "pairs": "scoring",
    "training": "training",
    "evaluation": "evaluation",
}
DISK = 1e9
"""bytes a second at which weights are read or written, of the published run"""
GRAPHS = 60.0
"""seconds in which a GPU engine compiles and captures its graphs"""


def main() -> None:
    """Prints both tables."""
    flags = sys.argv[1:]
    if any(flag in ("-h", "--help") for flag in flags):
        print(__doc__)
        return
    if "--config" not in flags:
        flags = ["--config", "jobs/configs/quickstart.yaml", *flags]
    print(f"{cpu_name()}; matmul peak {matmul_peak('bfloat16', 2):.0f} GFLOP/s in bfloat16 on 2 threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        argv = [sys.executable, "jobs/gsil_iterative.py", *flags, "--run.root", folder, "--run.name", "measured"]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        wall = time.monotonic() - began
        manifests = [read_json(path) or {} for path in Path(folder, "measured").rglob("manifest.json")]
    costs = table(wall, manifests)
    published(costs)


def table(wall: float, manifests: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Prints the run's; returns what every call of a kind cost beside its work, in the order of the calls."""
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])
    calls: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    before = ""
    for m in sorted(manifests, key=lambda m: m["finished"]):
        kind = KINDS.get(m["name"].rpartition("/")[2], m["name"])
        work = m["seconds"] if kind == "evaluation" else m["work_seconds"] or 0.0
        rows[kind] = [have + more for have, more in zip(rows[kind], (1, m["seconds"], work), strict=True)]
        # Engines sample for several stages in one call: one after the other in this order.
        call = calls[kind][m["finished"] if before != kind else list(calls[kind])[-1]]
        before = kind
        call[0], call[1] = call[0] + m["seconds"], call[1] + work
    rest = wall - sum(row[1] for row in rows.values())
    work = sum(row[2] for row in rows.values())
    print("\n| | stages | wall, s | work, s | beside it, s |\n|---|---|---|---|---|")
    for kind, (count, seconds, own) in rows.items():
        print(f"| {kind} | {count} | {seconds:.1f} | {own:.1f} | {seconds - own:.1f} |")
    print(f"| start and end of the job, Ray, report | | {rest:.1f} | | {rest:.1f} |")
    print(f"| **all** | {sum(row[0] for row in rows.values())} | {wall:.1f} | {work:.1f} | {wall - work:.1f} |")
    print(f"\n**{wall / work:.2f}** times the work")
    costs = {kind: [seconds - own for seconds, own in found.values()] for kind, found in calls.items()}
    return costs | {"job": [rest]}


def published(costs: Mapping[str, Sequence[float]]) -> None:
    """Prints the arithmetic: the first call of a kind starts its processes, further ones find them; beside that, bytes of weights."""
    model, turns = sizing.MODELS["8B"], sizing.ITERATIONS
    read = 2 * model.parameters / DISK
    first = {kind: costs[kind][0] for kind in ("generation", "scoring", "training")}
    later = {kind: min(costs[kind][1:] or costs[kind]) for kind in first}
    head = ("62,000 prompts, 8B, 3 iterations", "work, h", "kept warm, min", "of the work", "started anew, min", "of the work")
    print(f"\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for gpu, gpus in (("A100", 8), ("A100", 16), ("H100", 16)):
        size = sizing.size(model, sizing.GPUS[gpu], gpus)
        work = 3600 * (size.generation + size.scoring + size.training)
        # Engines read every policy once, the base model too; scorers and workers read one each iteration, which ends in an export that
        # is read back.
        weights = (turns + 2 + turns * 4) * read + GRAPHS
        once = costs["job"][0] + sum(first.values()) + weights
        warm = once + turns * sum(later.values())
        cold = once + turns * sum(first.values()) + turns * GRAPHS
        shown = [f"{work / 3600:.1f}", f"{warm / 60:.1f}", f"{1 + warm / work:.3f}", f"{cold / 60:.1f}", f"{1 + cold / work:.3f}"]
        print(f"| {gpus} x {gpu} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
