"""The table of reward models: win rate and right answers of the best of N over seeds, and a tournament of what they choose.

INPUT  seed-K/rewards/results: report.json and all samples with their scores
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.best_of_n_report import ORACLE, RANDOM
from pipelines.records import shards
from pipelines.reproduction import figures
from pipelines.reproduction.statistics import mean_and_error
from pipelines.run.artifacts import Run, Stage, read_json

PAPER = {"init-sft": "best, as bt", "init-demo": "below init-sft", "sft-demo": "below init-sft", "bt": "as init-sft"}
SHOWN = (4, 32)


def rewards(run: Run, stage: Stage, figure: Any) -> dict[str, Any]:
    """The content of the table; the figure is the share of right answers against N."""
    results = [given for given in stage.inputs.values() if run.manifest(given)]
    reports = [report for given in results if (report := read_json(run.directory(given) / "report.json"))]
    sizes = reports[0]["sizes"]
    lines = {
        name: {key: [report["selectors"][name][key] for report in reports] for key in ("golden", "win_rate")} for name in _names(reports)
    }
    greedy = [report["golden"]["greedy"] for report in reports]
    figures.best_of_n(figure, sizes, {name: line["golden"] for name, line in lines.items()}, float(np.mean(greedy)))
    places = [sizes.index(n) for n in SHOWN if n in sizes]
    header = ["chosen by", *(f"right, N = {sizes[k]}" for k in places), *(f"win + tie / 2 against greedy, N = {sizes[k]}" for k in places)]
    rows = [[*header, "paper"]]
    for name, line in lines.items():
        cells = [_cell([values[k] for values in line[key]]) for key in ("golden", "win_rate") for k in places]
        rows.append([name, *cells, PAPER.get(name, "")])
    tables = [chosen(run.directory(given), stage.settings["kinds"]) for given in results]
    return {"rows": rows, "greedy": greedy, "tournament": {"rows": tournament(tables, ["init-sft", "bt", "sft"])}}


def _names(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(reports[0]["selectors"])
    return sorted(names, key=lambda name: (name in (RANDOM, ORACLE), names.index(name)))


def _cell(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{100 * mean:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def chosen(results: Path, kinds: Sequence[str]) -> dict[str, list[float]]:
    """Golden score of every test problem by who chose the response: reward models of all samples, "sft" of one, the first."""
    found: dict[str, list[float]] = {name: [] for name in (*kinds, "sft")}
    for path in shards(results / "samples" / "held_out"):
        table = pq.read_table(path)
        ids = table["id"].to_numpy()
        starts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1), len(ids)]
        golden = table["golden"].to_numpy()
        for start, end in itertools.pairwise(starts):
            found["sft"].append(float(golden[start]))
            for kind in kinds:
                found[kind].append(float(golden[start + int(np.argmax(table[f"reward_{kind}"].to_numpy()[start:end]))]))
    return found


def tournament(tables: Sequence[Mapping[str, Sequence[float]]], names: Sequence[str]) -> list[list[str]]:
    """Win, tie and lose of every policy against every other, means over seeds: AfD Table 2, with the checker for a judge."""
    rows = [["", *(f"against {name}: win / tie / lose" for name in names)]]
    for ours in names:
        cells = []
        for theirs in names:
            shares = [compared(table[ours], table[theirs]) for table in tables]
            cells.append("" if ours == theirs else " / ".join(f"{np.mean([share[k] for share in shares]):.2f}" for k in range(3)))
        rows.append([ours, *cells])
    return rows


def compared(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Shares of problems on which the first has more, as much, less."""
    a, b = np.array(ours), np.array(theirs)
    return float((a > b).mean()), float((a == b).mean()), float((a < b).mean())
