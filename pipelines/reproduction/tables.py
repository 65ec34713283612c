"""Tables of a reproduction: means over seeds with standard errors, paired differences, the paper's number beside; a figure each.

INPUT  evaluations and trainings by role ARM:SEED:WHAT (WHAT: the iteration, or training-1)
OUTPUT tables/NAME/{table.json, table.md, figure.png, figure.svg}
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from actors.settings import READ_BY, Objective
from pipelines.reproduction import figures
from pipelines.reproduction.reward_table import rewards
from pipelines.reproduction.statistics import holm, mean_and_error, paired, stratified
from pipelines.run.artifacts import Run, Stage, StageError, write_json
from pipelines.tables import ruled

VERSION = 3
Scores = dict[int, list[float]]
"""By seed, of every test problem."""


class Found:
    """What the inputs of a table hold; what diverged is not there.

    Args:
        run: the run.
        stage: of the table.
    """

    def __init__(self, run: Run, stage: Stage):
        self.scores: dict[str, dict[str, Scores]] = {}
        self.curves: dict[str, dict[str, dict[int, list[dict[str, float]]]]] = {}
        self.chosen: dict[str, dict[str, Any]] = {}
        self.units: dict[str, str] = {}
        """of an arm's log ratios"""
        self.functions: dict[str, str] = {}
        """of an arm's objective"""
        self.held_out: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
        """metrics of its held-out pairs"""
        for role, given in stage.inputs.items():
            arm, seed, what = role.split(":")
            manifest = run.manifest(given)
            if manifest is None or manifest["numbers"].get("diverged"):
                continue
            if what.startswith("training"):
                lines = (run.directory(given) / "metrics.jsonl").read_text().splitlines()
                self.curves.setdefault(arm, {}).setdefault(what, {})[int(seed)] = [json.loads(line) for line in lines]
                self.chosen[arm] = manifest["numbers"]["chosen"]
                objective = Objective(**manifest["settings"]["objective"])
                self.functions[arm] = objective.function
                self.units[arm] = "nats a token" if objective.length_normalised else "nats"
                if told := manifest["numbers"].get("held_out"):
                    self.held_out.setdefault(arm, {}).setdefault(what, {})[int(seed)] = told
            else:
                scores = pq.read_table(run.directory(given) / "scores.parquet")["score"].to_pylist()
                self.scores.setdefault(arm, {}).setdefault(what, {})[int(seed)] = scores

    def accuracies(self, arm: str, what: str) -> list[float]:
        """By seed, in order."""
        return [sum(values) / len(values) for _, values in sorted(self.scores.get(arm, {}).get(what, {}).items())]

    def seeds(self) -> int:
        """How many there are, whatever arms diverged."""
        return len({seed for whats in self.scores.values() for by_seed in whats.values() for seed in by_seed})

    def cell(self, arm: str, what: str) -> str:
        """Its cell: the mean over seeds, and of how many, where it diverged on some."""
        values = self.accuracies(arm, what)
        return shown(values) + ("" if len(values) in (0, self.seeds()) else f" ({len(values)} of {self.seeds()} seeds)")

    def last(self, arm: str) -> str:
        """The last iteration of an arm that came to an end for some seed."""
        return max(self.scores[arm], key=int)


def shown(values: Sequence[float], scale: float = 100.0, digits: int = 1) -> str:
    """A mean with its standard error, by default in percent."""
    if not values:
        return "diverged"
    mean, error = mean_and_error(values)
    return f"{scale * mean:.{digits}f}" + ("" if error is None else f" ± {scale * error:.{digits}f}")


def _tail(line: Sequence[float]) -> float:
    """The mean of the last quarter of the steps: a step's own mean is over 16 rows."""
    last = line[-max(1, len(line) // 4) :]
    return sum(last) / len(last)


def compared(found: Found, arm: str, other: str) -> dict[str, Any] | None:
    """The paired difference of two arms after their last iterations, on the seeds that both have."""
    if arm not in found.scores or other not in found.scores:
        return None
    ours, theirs = (found.scores[name][found.last(name)] for name in (arm, other))
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    rows = [[a - b for a, b in zip(ours[seed], theirs[seed], strict=True)] for seed in seeds]
    difference = paired(*([sum(side[seed]) / len(side[seed]) for seed in seeds] for side in (ours, theirs)))
    return {
        "difference": difference.mean,
        "stderr": difference.stderr,
        "p": difference.p,
        "seeds": len(seeds),
        "stderr_problems": stratified(rows)[1],
    }


def _short(numbers: Mapping[str, Any]) -> str:
    error = "" if numbers["stderr"] is None else f" ± {100 * numbers['stderr']:.1f}"
    return f"{100 * numbers['difference']:+.1f}{error}"


def _difference(numbers: Mapping[str, Any] | None) -> str:
    if numbers is None:
        return ""
    return f"{_short(numbers)} (problems ± {100 * numbers['stderr_problems']:.1f}; p = {numbers['p']:.2g})"


def accuracy(found: Found, first: Sequence[str], arms: Sequence[str], papers: Mapping[str, str], against: Sequence[str]) -> dict[str, Any]:
    """The table of exact answers.

    Args:
        found: the inputs.
        first: policies without iterations.
        arms: the others.
        papers: the paper's numbers.
        against: arms that every arm is compared with.

    Returns:
        rows (the header first) and comparisons by arm and baseline; `p_holm` is corrected over all arms against that baseline.
    """
    iterations = sorted({what for arm in arms for what in found.scores.get(arm, {})}, key=int)
    comparisons: dict[str, dict[str, Any]] = {arm: {} for arm in arms}
    for other in against:
        known = {arm: numbers for arm in arms if arm != other and (numbers := compared(found, arm, other))}
        for (arm, numbers), p in zip(known.items(), holm([n["p"] for n in known.values()]), strict=True):
            comparisons[arm][other] = numbers | {"p_holm": p}
    rows = [["arm", *(f"after {t}" for t in iterations), *(f"against {other}" for other in against), "setting", "paper"]]
    for name in first:
        rows.append([name, found.cell(name, "0"), *[""] * (len(iterations) - 1 + len(against)), "", ""])
    for arm in arms:
        cells = [found.cell(arm, t) for t in iterations]
        rows.append([arm, *cells, *(_difference(comparisons[arm].get(o)) for o in against), _setting(found, arm), papers.get(arm, "")])
    return {"rows": rows, "comparisons": comparisons}


def _setting(found: Found, arm: str) -> str:
    if arm not in found.chosen:
        return ""
    chosen, function = found.chosen[arm], found.functions[arm]
    told = [f"lr {chosen['learning_rate']:g}"]
    if function not in ("sft", "slic"):
        told.append(f"beta {chosen['beta']:g}")
    if function in READ_BY["gamma"]:
        told.append(f"gamma {chosen['gamma']:g}")
    return ", ".join(told)


def rho(found: Found, arm: str, what: str, side: str) -> list[list[float]]:
    """The log ratio rho of real or generated responses at every step, a list a seed."""
    beta = found.chosen[arm]["beta"]
    return [[step[f"reward_{side}"] / beta for step in steps] for _, steps in sorted(found.curves[arm][what].items())]


def gsil(found: Found, settings: Mapping[str, Any], figure: Any) -> dict[str, Any]:
    """GSIL Table 2; the figure is its Fig. 2."""
    arms = settings["arms"]
    against = [name for name in ("sft", "sft-longer", "spin") if name in found.scores]
    content = accuracy(found, ["pre-trained", "sft"], arms, settings["papers"], against)
    curves = {arm: {side: rho(found, arm, "training-1", side) for side in ("real", "generated")} for arm in arms if _classifies(found, arm)}
    figures.rewards(figure, {arm: sides for arm, sides in curves.items() if "spin" in arm or "gsil" in arm})
    rows = [["arm", "rho of real responses, last quarter of iteration 1, nats", "of generated ones"]]
    rows[0] += ["held out: rho of real", "of generated", "pairs told apart"]
    for arm, sides in curves.items():
        rows.append([arm, *(shown([_tail(line) for line in lines], 1, 2) for lines in sides.values()), *_held_out(found, arm)])
    return content | {"rewards": {"rows": rows}}


def _held_out(found: Found, arm: str) -> list[str]:
    """Cells: log ratios of both sides of held-out pairs after the first iteration, and the share of these that it tells apart."""
    by_seed = found.held_out.get(arm, {}).get("training-1", {})
    if not by_seed:
        return ["", "", ""]
    beta = found.chosen[arm]["beta"]
    ratios = [shown([told[f"reward_{side}"] / beta for told in by_seed.values()], 1, 2) for side in ("real", "generated")]
    return [*ratios, shown([told["accuracy"] for told in by_seed.values()], 1, 2)]


def _classifies(found: Found, arm: str) -> bool:
    return "training-1" in found.curves.get(arm, {}) and found.functions[arm] != "sft"


def gsil_grid(found: Found, settings: Mapping[str, Any], figure: Any) -> dict[str, Any]:
    """GSIL Fig. 7."""
    means = {
        (beta, gamma): (lambda v: sum(v) / len(v) if v else None)(found.accuracies(f"{beta:g}/{gamma:g}", "1"))
        for beta in settings["betas"]
        for gamma in settings["gammas"]
    }
    rows = [["beta \\ gamma", *(f"{gamma:g}" for gamma in settings["gammas"])]]
    for beta in settings["betas"]:
        # Against the SFT policy of the same seed: seeds differ by more than settings.
        cells = [compared(found, f"{beta:g}/{gamma:g}", "sft") for gamma in settings["gammas"]]
        rows.append([f"{beta:g}", *("diverged" if cell is None else _short(cell) for cell in cells)])
    before = found.accuracies("sft", "0")
    figures.grid(figure, settings["betas"], settings["gammas"], means, sum(before) / len(before))
    return {"rows": rows, "sft": before, "learning_rate": settings["learning_rate"]}


def dil(found: Found, settings: Mapping[str, Any], figure: Any) -> dict[str, Any]:
    """DIL Tables 2 and 4; the figure is its Fig. 2."""
    arms = settings["arms"]
    against = [name for name in ("sft", "dpo", "simpo") if name in found.scores]
    content = accuracy(found, ["sft"], arms, settings["papers"], against)
    curves = {arm: rho(found, arm, "training-1", "real") for arm in arms if _classifies(found, arm)}
    figures.likelihood(figure, curves, found.units)
    rows = [["arm", "rho of chosen responses, last quarter", "of rejected ones", "in"]]
    for arm in curves:
        ends = [[_tail(line) for line in rho(found, arm, "training-1", side)] for side in ("real", "generated")]
        rows.append([arm, *(shown(values, 1, 3) for values in ends), found.units[arm]])
    return content | {"rewards": {"rows": rows}}


def afd(found: Found, settings: Mapping[str, Any], figure: Any) -> dict[str, Any]:
    """AfD Fig. 3: the golden score is the share of right answers, base 0 and demonstrations 1."""
    content = accuracy(found, ["base", "sft"], settings["arms"], settings["papers"], ["sft", "afd-dpo-preference"])
    base = found.accuracies("base", "0")
    normalised = {
        arm: [(a - b) / (1 - b) for a, b in zip(found.accuracies(arm, what), base, strict=True)]
        for arm, what in (("base", "0"), ("sft", "0"), *((arm, "1") for arm in settings["arms"] if arm in found.scores))
        if len(found.accuracies(arm, what)) == len(base)
    }
    figures.bars(figure, normalised)
    rows = [["policy", "golden score, base 0, demonstrations 1"], *([arm, shown(v, 1, 2)] for arm, v in normalised.items())]
    return content | {"golden": {"rows": rows}}


def beyond(found: Found, settings: Mapping[str, Any], figure: Any) -> dict[str, Any]:
    """Variants of GSIL, each against what it varies."""
    rows, comparisons, values = [["variant", "right", "against", "difference"]], {}, {}
    for variant, other in settings["against"].items():
        if variant in found.scores:
            comparisons[variant] = compared(found, variant, other) if other else None
            values[variant] = found.accuracies(variant, found.last(variant))
            rows.append([variant, found.cell(variant, found.last(variant)), other or "", _difference(comparisons[variant])])
    figures.bars(figure, values, "share of right answers")
    return {"rows": rows, "comparisons": comparisons}


TABLES: dict[str, Callable[[Found, Mapping[str, Any], Any], dict[str, Any]]] = {
    "gsil": gsil,
    "gsil_grid": gsil_grid,
    "dil": dil,
    "afd": afd,
    "beyond": beyond,
}


def make(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
    """The work of these stages.

    Raises:
        StageError: nothing of a table came to an end.
    """
    made = {}
    for stage in stages:
        missing = [role for role, given in stage.inputs.items() if not run.manifest(given) or run.numbers(given).get("diverged")]
        if len(missing) == len(stage.inputs):
            raise StageError(f"{stage.name}: nothing that it shows came to an end, see the log")
        with figures.written(run.directory(stage) / "figure") as figure:
            if stage.settings["table"] == "afd_rewards":
                content = rewards(run, stage, figure)
            else:
                content = TABLES[stage.settings["table"]](Found(run, stage), stage.settings, figure)
        content |= {"missing": missing}
        write_json(run.directory(stage) / "table.json", content)
        parts = [content, *(part for part in content.values() if isinstance(part, dict) and "rows" in part)]
        (run.directory(stage) / "table.md").write_text("\n\n".join(ruled(part["rows"]) for part in parts) + "\n", encoding="utf-8")
        made[stage.name] = {"rows": content["rows"], "missing": missing}
    return made
