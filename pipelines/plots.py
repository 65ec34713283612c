"""Pictures of what a run found."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.means import WIDE

ENDS = ("random", "oracle (golden)")
APART = 0.045
"""Between the lines of two selectors, in doublings of N: their bars stand side by side."""
MOST = 0.6
"""Between the first and the last of many."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Told apart also by who sees no red or no green (Okabe and Ito)."""


def plot_best_of_n(found: Mapping[str, Any], path: Path) -> None:
    """Golden score and win rate with their 95 % bars, against N, as PNG and SVG.

    Args:
        found: what report.json holds.
        path: without the ending.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    draw_best_of_n(figure, found)
    for ending in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=130)


def bars(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """How far the ends of bands are below and above, as matplotlib asks for it; the band of a resampled statistic need not hold it."""
    ends = zip(values, low, high, strict=True)
    below, above = zip(*((max(0.0, value - under), max(0.0, over - value)) for value, under, over in ends), strict=True)
    return [list(below), list(above)]


def draw_best_of_n(figure: Any, found: Mapping[str, Any], ink: str = "#222222") -> None:
    """The two halves of that figure.

    Args:
        figure: of matplotlib.
        found: what report.json holds.
        ink: colour of the upper end.
    """
    score_axes, win_axes = figure.subplots(1, 2)
    sizes, colours = found["sizes"], itertools.cycle(COLOURS)
    chosen = [name for name in found["selectors"] if name not in ENDS]
    normalised = found["selectors"]["random"]["normalised"] is not None
    key, low, high = ("normalised", "normalised_low", "normalised_high") if normalised else ("golden", "low", "high")
    for name, line in found["selectors"].items():
        colour = {ENDS[0]: "#9a9a9a", ENDS[1]: ink}.get(name) or next(colours)
        if name in ENDS:
            score_axes.plot(sizes, line[key], "--", color=colour, label=name)
            win_axes.plot(sizes, line["win_rate"], "--", color=colour, label=name)
            continue
        shift = 2 ** (min(APART, MOST / len(chosen)) * (chosen.index(name) - (len(chosen) - 1) / 2))
        style = {"color": colour, "label": name, "fmt": "o-", "markersize": 4, "elinewidth": 1, "capsize": 2}
        score_axes.errorbar([n * shift for n in sizes], line[key], yerr=bars(line[key], line[low], line[high]), **style)
        win_axes.errorbar([n * shift for n in sizes], line["win_rate"], yerr=[WIDE * (e or 0.0) for e in line["win_rate_stderr"]], **style)
    greedy = found["golden"]["greedy"]
    if normalised:
        span = found["golden"]["demonstrations"] - found["golden"]["base"]
        greedy = (greedy - found["golden"]["base"]) / span
    score_axes.axhline(greedy, color="#9a9a9a", linewidth=1, label="greedy response")
    score_axes.set_ylabel("golden score (base policy 0, demonstrations 1)" if normalised else "golden score")
    win_axes.axhline(0.5, color="#9a9a9a", linewidth=1)
    win_axes.set_ylabel("wins against the greedy response (ties half)")
    for axes in (score_axes, win_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.set_xlabel("N: samples the best is chosen from")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    score_axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Best of N, chosen by reward models: {found['prompts']} held-out prompts, 95 % bars over prompts", fontsize=11)
