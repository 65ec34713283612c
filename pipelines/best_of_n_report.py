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
    """What the report needs of a prompt; what a scorer failed on is not a number."""

    id: str
    golden_N: Array
    """zeros where there is no judge"""
    scores_MN: dict[str, Array]
    """by scorer"""


def centres_of(run: Run, stage: Stage, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each reward on held-out samples, where normalised rewards are asked for; else (0, 1).

    Raises:
        StageError: a scorer that decides together with others has no such numbers.
    """
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


def report(run: Run, stage: Stage, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Expected golden score and win rate of the best of n, for n = 1, 2, 4 ... N and every selector (exact, see `actors.reward`).

    Samples without a golden score are left out for all, those without a reward are never chosen by that selector alone: for n above the
    number of the others a prompt stays at what it has. Prompts whose greedy response, base response or demonstration has no golden
    score are left out. All of it is counted.

    Returns:
        what report.json holds.
    """
    means = {role: _mean_by_prompt(run, stage.inputs[role]) for role in ("greedy", "base", "demonstrations")}
    asked, names = len(prompts), [role.removeprefix("score-") for role in stage.inputs if role.startswith("score-")]
    unscored = {"golden": sum(int(np.isnan(prompt.golden_N).sum()) for prompt in prompts)}
    unscored |= {name: sum(int(np.isnan(prompt.scores_MN[name]).sum()) for prompt in prompts) for name in names}
    prompts = [judged for prompt in prompts if all(prompt.id in found for found in means.values()) and (judged := _judged(prompt))]
    if not prompts:
        raise StageError(f"{stage.name}: no held-out prompt has a golden score of a sample, its greedy response and its demonstration")
    ids = [prompt.id for prompt in prompts]
    base, top = (float(np.mean([means[role][key] for key in ids])) for role in ("base", "demonstrations"))
    greedy_P = np.array([means["greedy"][key] for key in ids])
    largest = max(len(prompt.golden_N) for prompt in prompts)
    sizes = sizes_up_to(largest)
    centres = centres_of(run, stage, names)
    choosers: dict[str, list[Array]] = {RANDOM: [np.zeros_like(prompt.golden_N) for prompt in prompts]}
    for name, members in stage.settings["selectors"].items():
        choosers[name] = [select(prompt, members, stage.settings, centres) for prompt in prompts]
    choosers[ORACLE] = [prompt.golden_N for prompt in prompts]
    return {
        "sizes": sizes,
        "kl": [kl_to_policy(n) for n in sizes],
        "prompts": len(prompts),
        "prompts_left_out": asked - len(prompts),
        "unscored": unscored,
        "samples": int(sum(len(prompt.golden_N) for prompt in prompts)),
        "golden": {"base": base, "demonstrations": top, "greedy": float(greedy_P.mean())},
        "selectors": {name: curve(scores, prompts, greedy_P, sizes, (base, top)) for name, scores in choosers.items()},
    }


def _judged(prompt: Prompt) -> Prompt | None:
    """A prompt with the samples that have a golden score; None if there is none."""
    kept = np.isfinite(prompt.golden_N)
    scores = {name: values[kept] for name, values in prompt.scores_MN.items()}
    return Prompt(prompt.id, prompt.golden_N[kept], scores) if kept.any() else None


def _mean_by_prompt(run: Run, stage: Stage) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for path in shards(run.directory(stage) / "held_out"):
        for row in pq.read_table(path, columns=["id", "score"]).to_pylist():
            if row["score"] is not None:
                scores.setdefault(row["id"], []).append(row["score"])
    return {key: float(np.mean(values)) for key, values in scores.items()}


def curve(
    scores: Sequence[Array], prompts: Sequence[Prompt], greedy_P: Array, sizes: Sequence[int], ends: tuple[float, float]
) -> dict[str, Any]:
    """One selector's line of the report.

    Args:
        scores: by which it chooses, `[N]` a prompt; what is not a number is not chosen, unless all are: then the choice is random.
        prompts: with golden scores.
        greedy_P: golden score of the greedy response to each.
        sizes: n, from 1 to the most samples a prompt has.
        ends: golden score of the base policy and of the demonstrations: 0 and 1 of the normalised score.

    Returns:
        lists over sizes: golden with stderr over prompts and low, high (95 %, bootstrap over prompts); normalised, and its stderr, low
        and high, None where both ends are equal; win, tie and lose against the greedy response, win_rate = win + tie / 2 and its stderr.
    """
    expected, wins, ties = (np.empty((len(prompts), len(sizes))) for _ in range(3))
    for p, (chosen_by_N, prompt) in enumerate(zip(scores, prompts, strict=True)):
        known = np.isfinite(chosen_by_N)
        usable_N, golden_N = (chosen_by_N[known], prompt.golden_N[known]) if known.any() else (np.zeros(len(known)), prompt.golden_N)
        chances_SN = chosen_with_probability(usable_N, [min(n, len(usable_N)) for n in sizes])
        expected[p] = chances_SN @ golden_N
        wins[p] = chances_SN @ (golden_N > greedy_P[p])
        ties[p] = chances_SN @ (golden_N == greedy_P[p])
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
