"""What Best-of-N is worth: golden score and win rate against N, exactly, from one set of samples (see `actors.reward.best_of_n`).

Shapes: P prompts, N samples of a prompt, M scorers, S sizes n.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from actors.reward.best_of_n import bootstrap_band, chosen_with_probability, combine, kl_to_policy, sizes_up_to
from pipelines.means import cell
from pipelines.records import shards
from pipelines.run.artifacts import Run, Stage, StageError

Array = npt.NDArray[np.float64]
RANDOM, ORACLE = "random", "oracle (golden)"
"""The two ends: choosing without looking, and choosing by the golden score itself."""


@dataclass(frozen=True)
class Prompt:
    """A prompt with its N samples; what a scorer failed on is not a number."""

    id: str
    response_N: npt.NDArray[np.object_]
    golden_N: Array
    """zeros where there is no judge"""
    scores_MN: dict[str, Array]
    """by scorer"""


def scorers(stage: Stage) -> list[str]:
    """Who scored the samples of a stage that chooses."""
    return [role.removeprefix("score-") for role in stage.inputs if role.startswith("score-")]


def centres_of(run: Run, stage: Stage) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each scorer's reward on held-out samples, where normalised rewards are asked for; else (0, 1).

    Raises:
        StageError: a scorer that decides together with others has no such numbers.
    """
    names = scorers(stage)
    centres = dict.fromkeys(names, (0.0, 1.0))
    together = {name for members in stage.settings["selectors"].values() if len(members) > 1 for name in members}
    for name in names if stage.settings["normalised"] else ():
        reward = stage.inputs[f"score-{name}"].inputs.get("reward")
        if reward is not None:
            config = json.loads((run.directory(reward) / "reward" / "config.json").read_text(encoding="utf-8"))
            if "reward_mean" not in config:
                raise StageError(f"{name} was trained without held-out samples to centre it on: set rewards.normalised=false")
            centres[name] = (config["reward_mean"], config["reward_std"] or 1.0)
        elif name in together:
            raise StageError(f"{name} has no mean and standard deviation to be normalised with: set rewards.normalised=false")
    return centres


def select(prompt: Prompt, members: Sequence[str], rule: Mapping[str, Any], centres: Mapping[str, tuple[float, float]]) -> Array:
    """The score `[N]` by which a selector chooses among the samples of a prompt; not a number where one of its members failed."""
    rewards_MN = np.array([(prompt.scores_MN[name] - centres[name][0]) / centres[name][1] for name in members])
    return combine(rewards_MN, rule["combine"], rule["k"])


class Report:
    """Expected golden score and win rate of the best of n, for n = 1, 2, 4 ... N and every selector (exact, see `actors.reward`).

    Prompts are taken in one at a time; of their samples stay `[3, S]` numbers a selector, so that N costs no memory.

    Samples without a golden score are left out for all, those without a reward are never chosen by that selector alone: for n above the
    number of the others a prompt stays at what it has. Prompts whose greedy response, base response or demonstration has no golden
    score are left out. All of it is counted.

    Args:
        run: the run.
        stage: that chooses.
    """

    def __init__(self, run: Run, stage: Stage):
        self.stage, self.centres = stage, centres_of(run, stage)
        self.means = {role: _mean_by_prompt(run, stage.inputs[role]) for role in ("greedy", "base", "demonstrations")}
        self.greedy = _responses(run, stage.inputs["greedy"].inputs["responses"])
        self.asked = self.samples = 0
        self.unscored = dict.fromkeys(["golden", *scorers(stage)], 0)
        self.judged: list[tuple[str, int]] = []
        """prompts with the number of their samples that have a golden score"""
        self.rows: dict[str, list[Array]] = {name: [] for name in (RANDOM, *stage.settings["selectors"], ORACLE)}

    def add(self, prompt: Prompt) -> None:
        """Takes in a prompt."""
        self.asked += 1
        for name, values in {"golden": prompt.golden_N, **prompt.scores_MN}.items():
            self.unscored[name] += int(np.isnan(values).sum())
        kept = np.isfinite(prompt.golden_N)
        if not kept.any() or not all(prompt.id in found for found in self.means.values()):
            return
        golden_N, greedy = prompt.golden_N[kept], self.means["greedy"][prompt.id]
        # The same words are a tie, also before a reward model whose rounding depends on what it reads beside them.
        same_N = prompt.response_N[kept] == self.greedy[prompt.id]
        values_3N = np.array([golden_N, (golden_N > greedy) & ~same_N, (golden_N == greedy) | same_N], dtype=np.float64)
        by_N = {RANDOM: np.zeros_like(golden_N), ORACLE: golden_N}
        by_N |= {
            name: select(prompt, members, self.stage.settings, self.centres)[kept]
            for name, members in self.stage.settings["selectors"].items()
        }
        for name, rows in self.rows.items():
            rows.append(best_of(by_N[name], values_3N))
        self.judged.append((prompt.id, len(golden_N)))

    def result(self) -> dict[str, Any]:
        """What report.json holds.

        Raises:
            StageError: no prompt could be judged.
        """
        if not self.judged:
            raise StageError(
                f"{self.stage.name}: no held-out prompt has a golden score of a sample, its greedy response and its demonstration"
            )
        counts = [count for _, count in self.judged]
        sizes = sizes_up_to(max(counts))
        # Whoever has fewer samples stays at what they have.
        places = [[sizes_up_to(count).index(min(n, count)) for n in sizes] for count in counts]
        golden = {role: float(np.mean([found[key] for key, _ in self.judged])) for role, found in self.means.items()}
        ends = golden["base"], golden["demonstrations"]
        return {
            "sizes": sizes,
            "kl": [kl_to_policy(n) for n in sizes],
            "prompts": len(counts),
            "prompts_left_out": self.asked - len(counts),
            "unscored": self.unscored,
            "samples": sum(counts),
            "golden": golden,
            "selectors": {
                name: curve(np.array([row[:, place] for row, place in zip(rows, places, strict=True)]), ends)
                for name, rows in self.rows.items()
            },
        }


def _mean_by_prompt(run: Run, stage: Stage) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for path in shards(run.directory(stage) / "held_out"):
        for row in pq.read_table(path, columns=["id", "score"]).to_pylist():
            if row["score"] is not None:
                scores.setdefault(row["id"], []).append(row["score"])
    return {key: float(np.mean(values)) for key, values in scores.items()}


def _responses(run: Run, stage: Stage) -> dict[str, str]:
    tables = [pq.read_table(path, columns=["id", "response"]) for path in shards(run.directory(stage) / "held_out")]
    return {key: text for table in tables for key, text in zip(*(table[name].to_pylist() for name in ("id", "response")), strict=True)}


def best_of(chosen_by_N: Array, values_VN: Array) -> Array:
    """Expected values of the best of n samples, `[V, S]`, for n = 1, 2, 4 ... N.

    Args:
        chosen_by_N: the score by which the best is chosen; what is not a number is not chosen, unless all are: then the choice is random.
        values_VN: of the samples.
    """
    known = np.isfinite(chosen_by_N)
    usable_N, values_VN = (chosen_by_N[known], values_VN[:, known]) if known.any() else (np.zeros(len(known)), values_VN)
    chances_SN = chosen_with_probability(usable_N, [min(n, len(usable_N)) for n in sizes_up_to(len(known))])
    return values_VN @ chances_SN.T


def curve(values_P3S: Array, ends: tuple[float, float]) -> dict[str, Any]:
    """One selector's line of the report.

    Args:
        values_P3S: expected golden score, share of wins and share of ties against the greedy response, of each prompt and size.
        ends: golden score of the base policy and of the demonstrations: 0 and 1 of the normalised score, which takes them as given: its
            error is that of the golden score, on its scale.

    Returns:
        lists over sizes: golden with stderr over prompts and low, high (95 %, bootstrap over prompts); normalised, and its stderr, low
        and high, None where both ends are equal; win, tie and lose against the greedy response, win_rate = win + tie / 2 and its stderr.
    """
    expected, wins, ties = values_P3S.swapaxes(0, 1)
    golden, stderr = _mean_and_error(expected)
    low, high = bootstrap_band(expected, seed=0)
    rate, rate_error = _mean_and_error(wins + ties / 2)
    # Ends that are equal but for rounding say nothing between them.
    base, span = ends[0], 0.0 if math.isclose(*ends, abs_tol=1e-12) else ends[1] - ends[0]
    values = {"golden": golden, "stderr": stderr, "low": low, "high": high}
    normalised = (
        {
            "normalised": (golden - base) / span,
            "normalised_stderr": stderr / abs(span),
            "normalised_low": ((low if span > 0 else high) - base) / span,
            "normalised_high": ((high if span > 0 else low) - base) / span,
        }
        if span
        else {}
    )
    against = {"win_rate": rate, "win_rate_stderr": rate_error, "win": wins.mean(0), "tie": ties.mean(0), "lose": 1 - (wins + ties).mean(0)}
    lists = {name: [float(v) if np.isfinite(v) else None for v in array] for name, array in (values | normalised | against).items()}
    return lists | ({} if span else {"normalised": None})


def _mean_and_error(values_PS: Array) -> tuple[Array, Array]:
    """Mean over prompts and its standard error; of a single prompt there is none."""
    prompts = len(values_PS)
    error = values_PS.std(axis=0, ddof=1) / np.sqrt(prompts) if prompts > 1 else np.full(values_PS.shape[1], np.nan)
    return values_PS.mean(axis=0), error


def tables(found: Mapping[str, Any], shown: Sequence[int] = (1, 4, 16, 64)) -> dict[str, list[list[str]]]:
    """The report at some n for a person, by title: win rate and golden score. Rows, the header first."""
    places = [k for k, n in enumerate(found["sizes"]) if n in (*shown, found["sizes"][-1])]
    golden = ("normalised", "normalised_stderr") if found["selectors"][RANDOM]["normalised"] else ("golden", "stderr")
    titles = {
        "win rate against the greedy response": ("win_rate", "win_rate_stderr"),
        f"{golden[0]} golden score".removeprefix("golden "): golden,
    }
    return {
        title: [["chosen by", *(f"N = {found['sizes'][k]}" for k in places)]]
        + [[name, *(cell(line[value][k], line[error][k], 2) for k in places)] for name, line in found["selectors"].items()]
        for title, (value, error) in titles.items()
    }
