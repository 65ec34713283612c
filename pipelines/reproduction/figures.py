"""Figures of a reproduction; every function draws on a figure of matplotlib. Bands are one standard error over seeds."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.plots import COLOURS

Curves = Sequence[Sequence[float]]
"""A line a seed."""


@contextlib.contextmanager
def written(path: Path) -> Iterator[Any]:
    """A figure that is saved as PNG and SVG.

    Args:
        path: without the ending.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    for ending in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=130)


def _plain(axes: Any) -> Any:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def band(axes: Any, curves: Curves, label: str, colour: str, style: str = "-") -> None:
    """The mean over seeds, smoothed over a tenth of the steps, with its standard error."""
    shortest = min(len(line) for line in curves)
    lines_ST = np.array([line[:shortest] for line in curves])
    width = max(1, shortest // 10)
    smooth_ST = np.array([np.convolve(line, np.ones(width) / width, mode="valid") for line in lines_ST])
    steps = np.linspace(width / shortest, 1, smooth_ST.shape[1])
    mean_T = smooth_ST.mean(axis=0)
    axes.plot(steps, mean_T, label=label, color=colour, linestyle=style)
    if len(lines_ST) > 1:
        error_T = smooth_ST.std(axis=0, ddof=1) / np.sqrt(len(lines_ST))
        axes.fill_between(steps, mean_T - error_T, mean_T + error_T, color=colour, alpha=0.15, linewidth=0)


def rewards(figure: Any, curves: Mapping[str, Mapping[str, Curves]]) -> None:
    """Log ratios of real and generated responses over an iteration, an axis an arm."""
    panels = np.atleast_1d(figure.subplots(1, max(1, len(curves)), sharey=True))
    for axes, (arm, sides) in zip(panels, curves.items(), strict=False):
        for colour, (side, lines) in zip((COLOURS[1], COLOURS[0]), sides.items(), strict=True):
            band(_plain(axes), lines, side, colour)
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.set_title(arm, fontsize=9)
    figure.supxlabel("share of the iteration", fontsize=10)
    panels[0].set_ylabel("log ratio to the reference, nats")
    panels[0].legend(frameon=False, fontsize=8)


def likelihood(figure: Any, curves: Mapping[str, Curves], units: Mapping[str, str]) -> None:
    """Log ratio of the chosen responses over training, a line an arm and an axis a unit."""
    kinds = sorted({units[arm] for arm in curves})
    for axes, unit in zip(np.atleast_1d(figure.subplots(1, max(1, len(kinds)))), kinds, strict=False):
        for number, (arm, lines) in enumerate((arm, lines) for arm, lines in curves.items() if units[arm] == unit):
            band(_plain(axes), lines, arm, COLOURS[number % len(COLOURS)], "-" if number < len(COLOURS) else "--")
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.set_xlabel("share of training")
        axes.set_ylabel(f"log ratio of chosen responses, {unit}")
        axes.legend(frameon=False, fontsize=8)


def grid(
    figure: Any, betas: Sequence[float], gammas: Sequence[float], means: Mapping[tuple[float, float], float | None], before: float
) -> None:
    """Share of right answers over beta and gamma."""
    axes = figure.subplots()
    values = np.array([[np.nan if (v := means[beta, gamma]) is None else v for gamma in gammas] for beta in betas])
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=max(before, np.nanmax(values)), aspect="auto")
    axes.set_xticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
    axes.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axes.set_xlabel("gamma")
    axes.set_ylabel("beta")
    middle = np.nanmax(values) / 2
    for (row, column), value in np.ndenumerate(values):
        text = "diverged" if np.isnan(value) else f"{100 * value:.0f}"
        axes.text(column, row, text, ha="center", va="center", color="white" if not value > middle else "black")
    figure.colorbar(image, label=f"share of right answers (SFT policy: {before:.2f})")


def bars(figure: Any, values: Mapping[str, Sequence[float]], what: str = "golden score (base 0, demonstrations 1)") -> None:
    """A bar a policy."""
    axes = _plain(figure.subplots())
    for number, line in enumerate(values.values()):
        error = np.std(line, ddof=1) / np.sqrt(len(line)) if len(line) > 1 else 0.0
        axes.bar(number, np.mean(line), yerr=error, color=COLOURS[number % len(COLOURS)], capsize=4)
    axes.set_xticks(range(len(values)), list(values), rotation=20, ha="right", fontsize=8)
    axes.set_ylabel(what)


def best_of_n(figure: Any, sizes: Sequence[int], lines: Mapping[str, Curves], greedy: float) -> None:
    """Golden score of the best of N against N, a line a chooser."""
    axes = _plain(figure.subplots())
    for number, (name, values) in enumerate(lines.items()):
        lines_SN = np.array(values)
        mean_N = lines_SN.mean(axis=0)
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(sizes, mean_N, label=name, color=colour, marker="o", markersize=3)
        if len(lines_SN) > 1:
            error_N = lines_SN.std(axis=0, ddof=1) / np.sqrt(len(lines_SN))
            axes.fill_between(sizes, mean_N - error_N, mean_N + error_N, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(greedy, color="#888888", linewidth=0.8, linestyle="--", label="greedy response")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.set_xlabel("N: samples the best is chosen from")
    axes.set_ylabel("share of right answers")
    axes.legend(frameon=False, fontsize=8)
