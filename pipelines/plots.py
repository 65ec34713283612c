"""Pictures of what a run found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.means import WIDE

ENDS = ("random", "oracle (golden)")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Told apart also by who sees no red or no green (Okabe and Ito)."""


def plot_best_of_n(found: Mapping[str, Any], path: Path) -> None:
    """Golden score and win rate with their 95 % bands, against N, as PNG and SVG.

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


def draw_best_of_n(figure: Any, found: Mapping[str, Any], ink: str = "#222222") -> None:
    """The two halves of that figure.

    Args:
        figure: of matplotlib.
        found: what report.json holds.
        ink: colour of the upper end.
    """
    score_axes, win_axes = figure.subplots(1, 2)
    sizes, colours = found["sizes"], iter(COLOURS * 4)
    normalised = found["selectors"]["random"]["normalised"] is not None
    key, band = ("normalised", ("normalised_low", "normalised_high")) if normalised else ("golden", ("low", "high"))
    for name, line in found["selectors"].items():
        colour = {ENDS[0]: "#9a9a9a", ENDS[1]: ink}.get(name) or next(colours)
        style = {"color": colour, "linestyle": "--" if name in ENDS else "-", "marker": None if name in ENDS else "o", "markersize": 4}
        score_axes.plot(sizes, line[key], label=name, **style)
        if name not in ENDS:
            score_axes.fill_between(sizes, line[band[0]], line[band[1]], color=colour, alpha=0.12, linewidth=0)
            half = [WIDE * (error or 0.0) for error in line["win_rate_stderr"]]
            low, high = ([rate + sign * width for rate, width in zip(line["win_rate"], half, strict=True)] for sign in (-1, 1))
            win_axes.fill_between(sizes, low, high, color=colour, alpha=0.12, linewidth=0)
        win_axes.plot(sizes, line["win_rate"], label=name, **style)
    greedy = found["golden"]["greedy"]
    if normalised:
        span = found["golden"]["demonstrations"] - found["golden"]["base"]
        greedy = (greedy - found["golden"]["base"]) / span
    score_axes.axhline(greedy, color="#bbbbbb", linewidth=1)
    score_axes.annotate("greedy response", (sizes[-1], greedy), ha="right", va="bottom", fontsize=8, color="#777777")
    score_axes.set_ylabel("golden score (base policy 0, demonstrations 1)" if normalised else "golden score")
    win_axes.axhline(0.5, color="#bbbbbb", linewidth=1)
    win_axes.set_ylabel("wins against the greedy response (ties half)")
    for axes in (score_axes, win_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.set_xlabel("N: samples the best is chosen from")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    score_axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Best of N, chosen by reward models: {found['prompts']} held-out prompts, 95 % bands over prompts", fontsize=11)
