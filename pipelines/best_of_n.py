"""Best-of-N: many samples a prompt, scored; the best of them kept, and a report of what that is worth for every N up to theirs.

policy --N samples a prompt--> best_of_n/samples                          (generation)
samples, scorers           --> best_of_n/golden, best_of_n/init-sft-0 ... (scoring, one stage a scorer)
samples, scores            --> best_of_n/results/                         (here)
    samples/held_out/*.parquet         all samples with all scores
    chosen.held_out.jsonl              {input, output, reward}: the best of each prompt; a layout that demonstrations can have
    preferences.held_out.jsonl         {prompt, chosen, rejected}: the best and the worst
    report.json, best_of_n.png, .svg   golden score and win rate against N
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actors.reward.best_of_n import bootstrap_band, chosen_with_probability, combine, kl_to_policy, sizes_up_to
from pipelines.artifacts import Run, Stage, StageError, replacing, write_json
from pipelines.plots import plot_best_of_n
from pipelines.records import shards
from pipelines.settings import Combination

Array = npt.NDArray[np.float64]
RANDOM, ORACLE = "random", "oracle (golden)"
"""The two ends: choosing without looking, and choosing by the golden score itself."""


@dataclass(frozen=True)
class Golden:
    """Stages with golden scores."""

    samples: Stage
    """of the N samples"""
    greedy: Stage
    """of the same policy's greedy responses: what a choice has to win against"""
    base: Stage
    """of samples of the base policy: 0 of the normalised score"""
    demonstrations: Stage
    """its 1"""

    def stages(self) -> tuple[Stage, ...]:
        """All of them."""
        return self.samples, self.greedy, self.base, self.demonstrations


def plan(
    samples: Stage, golden: Golden, scores: Mapping[str, Stage], selectors: Mapping[str, Sequence[str]], chooser: str, rule: Combination
) -> Stage:
    """The stage that chooses and reports.

    Args:
        samples: N of each prompt.
        golden: scores by an independent judge.
        scores: of `samples`, by scorer.
        selectors: who chooses: names of scorers, whose combined score decides.
        chooser: the selector whose choice is written out.
        rule: how several scores are combined.
    """
    settings = {"selectors": {name: list(members) for name, members in selectors.items()}, "chooser": chooser} | rule.identity()
    roles = {"golden": golden.samples, "greedy": golden.greedy, "base": golden.base, "demonstrations": golden.demonstrations}
    return Stage(
        "best_of_n/results", settings, {"samples": samples} | roles | {f"score-{k}": s for k, s in scores.items()}, demand="the driver"
    )


def choose(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
    """The work of the stage."""
    (stage,) = stages
    found: dict[str, Any] = {}
    for split in ("held_out", "train"):
        prompts = write_choices(run, stage, split)
        if prompts and split == "held_out":
            found = report(run, stage, prompts)
            write_json(run.directory(stage) / "report.json", found)
            plot_best_of_n(found, run.directory(stage) / "best_of_n")
    return {stage.name: found}


@dataclass(frozen=True)
class Prompt:
    """What the report needs of a prompt: the scores of the samples that all scorers could score. N samples, M scorers."""

    id: str
    golden_N: Array
    scores_MN: dict[str, Array]


def write_choices(run: Run, stage: Stage, split: str) -> list[Prompt]:
    """Joins samples and scores of a split, writes them and the chosen ones; one file of samples in memory at a time."""
    folder = run.directory(stage)
    names = [role.removeprefix("score-") for role in stage.inputs if role.startswith("score-")]
    members, centres = stage.settings["selectors"][stage.settings["chooser"]], centres_of(run, stage, names)
    prompts: list[Prompt] = []
    files = shards(run.directory(stage.inputs["samples"]) / split)
    if not files:
        return prompts
    (folder / "samples" / split).mkdir(parents=True, exist_ok=True)
    with _lines(folder / f"chosen.{split}.jsonl") as chosen, _lines(folder / f"preferences.{split}.jsonl") as preferences:
        for path in files:
            table = pq.read_table(path).drop_columns(["prompt_ids", "response_ids"])
            for role, name in [("golden", "golden"), *((f"score-{name}", name) for name in names)]:
                scores = pq.read_table(run.directory(stage.inputs[role]) / split / path.name, columns=["id", "sample", "score"])
                assert scores.select(["id", "sample"]).equals(table.select(["id", "sample"])), f"{path}: rows of {role} are others"
                table = table.append_column(name if name == "golden" else f"reward_{name}", scores["score"])
            with replacing(folder / "samples" / split / path.name) as temporary:
                pq.write_table(table, temporary, compression="zstd")
            for rows, prompt in _by_prompt(table, names):
                if len(prompt.golden_N):
                    prompts.append(prompt)
                    combined = select(prompt, members, stage.settings, centres)
                    _write_choice(table, rows, combined, chosen, preferences)
    return prompts


@contextlib.contextmanager
def _lines(path: Path) -> Iterator[TextIO]:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


def _by_prompt(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[npt.NDArray[np.int64], Prompt]]:
    """Each prompt with the rows of its samples that have all scores; those of a prompt follow each other."""
    ids = table["id"].to_numpy()
    columns = {name: table[name if name == "golden" else f"reward_{name}"].to_numpy() for name in ("golden", *names)}
    scored = np.all([np.isfinite(column) for column in columns.values()], axis=0)
    starts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1), len(ids)]
    for start, end in itertools.pairwise(starts):
        rows = start + np.flatnonzero(scored[start:end])
        yield rows, Prompt(ids[start], columns["golden"][rows], {name: columns[name][rows] for name in names})


def centres_of(run: Run, stage: Stage, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each reward on held-out samples, where normalised rewards are asked for; else (0, 1).

    Raises:
        StageError: a scorer has no such numbers.
    """
    centres = {}
    for name in names:
        reward = stage.inputs[f"score-{name}"].inputs.get("reward")
        if not stage.settings["normalised"]:
            centres[name] = (0.0, 1.0)
        elif reward is None:
            raise StageError(f"{name} has no mean and standard deviation to be normalised with: set rewards.normalised=false")
        else:
            config = json.loads((run.directory(reward) / "reward" / "config.json").read_text(encoding="utf-8"))
            centres[name] = (config["reward_mean"], config["reward_std"] or 1.0)
    return centres


def select(prompt: Prompt, members: Sequence[str], rule: Mapping[str, Any], centres: Mapping[str, tuple[float, float]]) -> Array:
    """The score `[N]` by which a selector chooses among the samples of a prompt."""
    rewards_MN = np.array([(prompt.scores_MN[name] - centres[name][0]) / centres[name][1] for name in members])
    return combine(rewards_MN, rule["combine"], rule["k"])


def _write_choice(table: pa.Table, rows: npt.NDArray[np.int64], scores_N: Array, chosen: TextIO, preferences: TextIO) -> None:
    best, worst = (table.slice(int(rows[place]), 1).to_pylist()[0] for place in (scores_N.argmax(), scores_N.argmin()))
    line = {"input": best["prompt"], "output": best["response"], "reward": float(scores_N.max())}
    chosen.write(json.dumps(line, ensure_ascii=False) + "\n")
    if best["response"] != worst["response"]:
        sides = {key: [{"role": "assistant", "content": row["response"]}] for key, row in (("chosen", best), ("rejected", worst))}
        preferences.write(json.dumps({"prompt": best["prompt"]} | sides, ensure_ascii=False) + "\n")


def report(run: Run, stage: Stage, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Expected golden score and win rate of the best of n, for n = 1, 2, 4 ... N and every selector (exact, see `actors.reward`).

    A prompt some of whose samples have no score counts with the others: for n above their number it stays at what it has. Prompts whose
    greedy response or demonstration has no golden score are left out.

    Returns:
        what report.json holds.
    """
    means = {role: _mean_by_prompt(run, stage.inputs[role]) for role in ("greedy", "base", "demonstrations")}
    prompts = [prompt for prompt in prompts if prompt.id in means["greedy"] and prompt.id in means["demonstrations"]]
    if not prompts:
        raise StageError(f"{stage.name}: no held-out prompt has a golden score of its greedy response and of its demonstration")
    ids = [prompt.id for prompt in prompts]
    base, top = (float(np.mean([means[role][key] for key in ids if key in means[role]])) for role in ("base", "demonstrations"))
    greedy_P = np.array([means["greedy"][key] for key in ids])
    largest = max(len(prompt.golden_N) for prompt in prompts)
    sizes = sizes_up_to(largest)
    names = [role.removeprefix("score-") for role in stage.inputs if role.startswith("score-")]
    centres = centres_of(run, stage, names)
    choosers: dict[str, list[Array]] = {RANDOM: [np.zeros_like(prompt.golden_N) for prompt in prompts]}
    for name, members in stage.settings["selectors"].items():
        choosers[name] = [select(prompt, members, stage.settings, centres) for prompt in prompts]
    choosers[ORACLE] = [prompt.golden_N for prompt in prompts]
    return {
        "sizes": sizes,
        "kl": [kl_to_policy(n) for n in sizes],
        "prompts": len(prompts),
        "samples": int(sum(len(prompt.golden_N) for prompt in prompts)),
        "golden": {"base": base, "demonstrations": top, "greedy": float(greedy_P.mean())},
        "selectors": {name: curve(scores, prompts, greedy_P, sizes, (base, top)) for name, scores in choosers.items()},
    }


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
        scores: by which it chooses, `[N]` a prompt.
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
        chances_SN = chosen_with_probability(chosen_by_N, [min(n, len(chosen_by_N)) for n in sizes])
        expected[p] = chances_SN @ prompt.golden_N
        wins[p] = chances_SN @ (prompt.golden_N > greedy_P[p])
        ties[p] = chances_SN @ (prompt.golden_N == greedy_P[p])
    golden, stderr = _mean_and_error(expected)
    low, high = bootstrap_band(expected, seed=0)
    rate, rate_error = _mean_and_error(wins + ties / 2)
    base, span = ends[0], ends[1] - ends[0]
    values = {"golden": golden, "stderr": stderr, "low": low, "high": high}
    normalised = (
        {
            "normalised": (golden - base) / span,
            "normalised_stderr": stderr / abs(span),
            "normalised_low": (low - base) / span,
            "normalised_high": (high - base) / span,
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


def table(found: Mapping[str, Any], shown: Sequence[int] = (1, 4, 16, 64)) -> list[list[str]]:
    """Rows of the report for a person, the header first: win rate and normalised golden score at some n."""
    sizes = [n for n in found["sizes"] if n in (*shown, found["sizes"][-1])]
    key = "normalised" if found["selectors"][RANDOM]["normalised"] else "golden"
    rows = [["chosen by", *(f"{what}, N = {n}" for n in sizes for what in ("win rate", key))]]
    for name, line in found["selectors"].items():
        cells = []
        for n in sizes:
            place = found["sizes"].index(n)
            error = "normalised_stderr" if key == "normalised" else "stderr"
            cells += [_cell(line["win_rate"][place], line["win_rate_stderr"][place]), _cell(line[key][place], line[error][place])]
        rows.append([name, *cells])
    return rows


def _cell(value: float, error: float | None) -> str:
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"
