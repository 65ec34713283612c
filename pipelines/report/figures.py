"""The plots of a report, as SVG that takes its ink from the page, so that it is read in the light, in the dark and in print."""

import functools
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipelines.plots import COLOURS, bars
from pipelines.report.facts import EVALUATED, Facts, Lengths

INK = "#010203"
"""Stands for the page's own colour of text."""
PANELS = {
    "rewards (beta x log ratio)": ("reward_real", "reward_generated"),
    "margin": ("margin",),
    "loss and its parts": ("loss", "loss_real", "loss_generated"),
    "log-probs, nats": ("logps_real", "logps_generated"),
    "pairs told apart": ("accuracy",),
    "gradient norm": ("grad_norm",),
}
"""What a training step logs, and what is drawn together."""
REWARD_PANELS = {"rewards (scores)": PANELS["rewards (beta x log ratio)"]} | {
    title: keys for title, keys in PANELS.items() if not title.startswith(("rewards", "log-probs"))
}
"""The same of a reward model, whose reward is its score: there is no policy with log-probs."""
SFT = ("loss", "grad_norm", "tokens_per_second")
REWARDS = "rewards/"
TRAININGS = {"training": "Training on pairs", "rewards": "Training of reward models", "sft": "Training on demonstrations"}
"""What is drawn of a training, and what that is called."""
MOST_NAMED = 60
"""Letters above a panel at most; longer names stand in the heading alone."""
SHOWN = {"grad_norm": "gradient norm"}
Curves = Mapping[str, Sequence[Mapping[str, float]]]
"""training -> its steps"""
Ranges = Mapping[str, Sequence[float]]
"""what a step logs -> its least and greatest value"""
MOST_POINTS = 400
"""Points of a curve at most; a longer one shows means of neighbours."""


def training(facts: Facts, beside: Sequence[Facts] = ()) -> dict[str, str]:
    """Every training, those of a kind one after the other or over each other, by a heading that names them in their order.

    Args:
        facts: of a run.
        beside: runs whose trainings are looked at next to these: their vertical axes have the same ranges.
    """
    shown, others = _by_kind(facts), [_by_kind(run) for run in beside]
    return {
        f"{TRAININGS[kind]}: {', '.join(curves)}": _drawn(kind, [curves, _ranges(run[kind] for run in others)])
        for kind, curves in shown.items()
        if curves
    }


def _ranges(runs: Iterable[Curves]) -> dict[str, tuple[float, float]]:
    """Of all that is drawn of a training, over all trainings of these runs."""
    steps = [step for curves in runs for training in curves.values() for step in training]
    drawn = {key for keys in (*PANELS.values(), SFT) for key in keys}
    values = {key: [step[key] for step in steps if step.get(key) is not None and math.isfinite(step[key])] for key in sorted(drawn)}
    return {key: (min(found), max(found)) for key, found in values.items() if found}


def _by_kind(facts: Facts) -> dict[str, dict[str, Sequence[Mapping[str, float]]]]:
    found: dict[str, dict[str, Sequence[Mapping[str, float]]]] = {kind: {} for kind in TRAININGS}
    for name, steps in facts.curves.items():
        kind = "sft" if "reward_real" not in steps[0] else "rewards" if name.startswith(REWARDS) else "training"
        found[kind][name.removesuffix("/training").removeprefix(REWARDS)] = steps
    return found


def accuracy(facts: Facts, beside: Sequence[Facts] = ()) -> str:
    """Held-out accuracy of every policy, with two standard errors either side; `beside` as in `training`."""
    found = facts.evaluations()
    ends = [n["accuracy"] + 2 * (n["stderr"] or 0.0) for run in beside for n in run.evaluations().values()]
    data = {name: [n["accuracy"], n["stderr"]] for name, n in found.items()}, max(ends, default=None)
    return _drawn("accuracy", data) if len(found) > 1 else ""


def ranking(facts: Facts) -> str:
    """Ratings of a tournament's contestants, with their bands."""
    rows = [row for row in facts.stage("evaluation/tournament/games").get("ranking", []) if row["games"]]
    return _drawn("ranking", rows) if rows else ""


def lengths(facts: Facts) -> str:
    """Tokens of the responses that were trained against, or that were evaluated, and how they ended."""
    shown = {name: found for name, found in facts.lengths.items() if not name.endswith(("/samples", "/draws")) and found.tokens}
    return _drawn("lengths", {name.removeprefix(EVALUATED): _histogram(found) for name, found in shown.items()}) if shown else ""


def best_of_n(facts: Facts) -> str:
    """Golden score and win rate against N."""
    return _drawn("best_of_n", facts.best_of_n) if facts.best_of_n else ""


def _drawn(name: str, data: Any) -> str:
    return _cached(name, json.dumps(data))


@functools.lru_cache(maxsize=32)
def _cached(name: str, data: str) -> str:
    """Drawn once: after most stages most figures are what they were."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    # A seed of its own makes the same figure the same file.
    style: Any = dict.fromkeys(inked, INK) | {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "axes.axisbelow": True}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.15, "grid.color": INK}
    style |= {"legend.frameon": False, "lines.linewidth": 1.4, "font.family": "sans-serif"}
    with rc_context(style):
        figure = Figure(layout="constrained")
        FigureCanvasSVG(figure)
        DRAW[name](figure, json.loads(data))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"(?s)<metadata>.*?</metadata>", "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px sans-serif", svg)
    return svg.replace(INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _training(figure: Any, data: tuple[Curves, Ranges], panels: Mapping[str, Sequence[str]] = PANELS) -> None:
    """The paper's Fig. 2 and the rest of what a step logs."""
    curves, ranges = data
    figure.set_size_inches(10, 5.6)
    figure.get_layout_engine().set(hspace=0.08)
    grid = figure.subplots(2, 3)
    for unused in grid.flat[len(panels) :]:
        unused.remove()
    for place, (axes, (title, keys)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
        start = 0
        for number, (name, steps) in enumerate(curves.items()):
            for key, colour in zip(keys, COLOURS, strict=False):
                values = [(start + k, step[key]) for k, step in enumerate(steps, start=1) if step.get(key) is not None]
                mark = "." if len(values) == 1 else ""
                axes.plot(*_thinned(values), color=colour, marker=mark, label=key.replace("_", " ") if number == 0 else None)
            if number:
                axes.axvline(start + 0.5, color=INK, alpha=0.4, linewidth=0.8, linestyle=":")
            if title.startswith("rewards") and len("".join(curves)) <= MOST_NAMED:
                axes.annotate(name, (start + 1, 1), xycoords=("data", "axes fraction"), fontsize=7, va="bottom", annotation_clip=False)
            start += len(steps)
        if title.startswith(("rewards", "margin")):
            axes.axhline(0, color=INK, alpha=0.4, linewidth=0.8)
        # Names of iterations stand below the first title: those beside it are as high.
        axes.set_title(title, fontsize=9, pad=14 if place < grid.shape[1] else 6)
        _steps(axes, ranges, keys, legend=len(keys) > 1)


def _sft(figure: Any, data: tuple[Curves, Ranges]) -> None:
    curves, ranges = data
    figure.set_size_inches(10, 2.6)
    for axes, key in zip(figure.subplots(1, 3), SFT, strict=True):
        for (name, steps), colour in zip(curves.items(), itertools.cycle(COLOURS)):
            values = [(k, step[key]) for k, step in enumerate(steps, start=1) if step.get(key) is not None]
            axes.plot(*_thinned(values), color=colour, marker="." if len(values) == 1 else "", label=name)
        axes.set_title(SHOWN.get(key, key.replace("_", " ")), fontsize=9)
        _steps(axes, ranges, (key,), legend=len(curves) > 1)


def _steps(axes: Any, ranges: Ranges, keys: Sequence[str], legend: bool) -> None:
    """An axis of whole steps, the other of the range asked for, and room for the legend above the curves, of which it would hide some."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    if legend:
        low, high = axes.get_ylim()
        rows = -(-len(axes.get_legend_handles_labels()[1]) // 3)
        axes.set_ylim(low, high + 0.15 * rows * (high - low))
        axes.legend(fontsize=7, loc="upper center", ncols=3, columnspacing=1, handlelength=1.2)
    if known := [ranges[key] for key in keys if key in ranges]:
        # With room for a legend, whether it has one or not.
        low, high = min(low for low, _ in known), max(high for _, high in known)
        axes.set_ylim(low - 0.05 * (high - low or 1), high + 0.25 * (high - low or 1))


def _accuracy(figure: Any, data: tuple[Mapping[str, Sequence[float | None]], float | None]) -> None:
    found, highest = data
    figure.set_size_inches(max(3.5, 1.1 * len(found) + 1), 2.8)
    axes = figure.subplots()
    values = [value for value, _ in found.values()]
    errors = [2 * (error or 0.0) for _, error in found.values()]
    axes.errorbar(list(found), values, yerr=errors, fmt="o", color=COLOURS[0], capsize=4)
    axes.set_ylabel("held-out accuracy\n(bars: 2 standard errors)")
    axes.set_ylim(bottom=0, top=1.05 * highest if highest else None)
    axes.margins(x=0.1)


def _ranking(figure: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    figure.set_size_inches(6, 0.35 * len(rows) + 0.9)
    axes = figure.subplots()
    values = [row["rating"] for row in rows]
    ends = bars(values, *([row[end] for row in rows] for end in ("low", "high")))
    axes.errorbar(values, [row["name"] for row in rows], xerr=ends, fmt="o", color=COLOURS[0], capsize=4)
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.set_xlabel("rating (Bradley-Terry on Elo's scale, 95 % bands over prompts)")


def _histogram(found: Lengths) -> dict[str, Any]:
    width = max(1, -(-(max(found.tokens) + 1) // 30))
    counts = [0] * (max(found.tokens) // width + 1)
    for tokens in found.tokens:
        counts[tokens // width] += 1
    return {"width": width, "counts": counts, "finish": dict(found.finish)}


def _lengths(figure: Any, found: Mapping[str, Mapping[str, Any]]) -> None:
    figure.set_size_inches(10, 2.8)
    lengths, ends = figure.subplots(1, 2, width_ratios=(2, 1))
    kinds = sorted({kind for histogram in found.values() for kind in histogram["finish"]}, key=lambda kind: (kind != "stop", kind))
    for (name, histogram), colour in zip(found.items(), itertools.cycle(COLOURS)):
        edges = [k * histogram["width"] for k in range(len(histogram["counts"]) + 1)]
        share = [count / sum(histogram["counts"]) for count in histogram["counts"]]
        lengths.stairs(share, edges, color=colour, label=name, linewidth=1.4)
    below = dict.fromkeys(found, 0.0)
    for kind in kinds:
        shares = {name: h["finish"].get(kind, 0) / sum(h["finish"].values()) for name, h in found.items()}
        colour = COLOURS[2] if kind == "stop" else COLOURS[1]
        ends.barh(list(shares), list(shares.values()), left=list(below.values()), color=colour, label=kind, height=0.6)
        below = {name: below[name] + share for name, share in shares.items()}
    lengths.set_xlabel("tokens of a response")
    lengths.set_ylabel("share")
    lengths.legend(fontsize=7)
    ends.set_xlim(0, 1)
    ends.invert_yaxis()
    ends.set_xlabel("how they ended")
    ends.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(kinds))


def _best_of_n(figure: Any, found: Mapping[str, Any]) -> None:
    from pipelines.plots import draw_best_of_n

    figure.set_size_inches(10, 4)
    draw_best_of_n(figure, found, INK)


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    every = -(-len(points) // MOST_POINTS) or 1
    parts = [points[start : start + every] for start in range(0, len(points), every)]
    return [part[0][0] for part in parts], [sum(value for _, value in part) / len(part) for part in parts]


DRAW: dict[str, Callable[[Any, Any], None]] = {
    "training": _training,
    "rewards": functools.partial(_training, panels=REWARD_PANELS),
    "sft": _sft,
    "accuracy": _accuracy,
    "ranking": _ranking,
    "lengths": _lengths,
    "best_of_n": _best_of_n,
}
