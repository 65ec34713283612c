"""Reward models from demonstrations alone (AfD, arXiv 2405.15624): pairs of responses, training, and what the reward knows.

base/responses, sft/responses, demonstrations, preferences --> rewards/init-sft/pairs/{train,held_out}   (REWARD_PAIR)
pairs --policy_training--> rewards/init-sft/seed-0/reward/ (a classifier with one label)
held-out rewards and pairs --> rewards/metrics/metrics.json
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from actors.reward import metrics
from actors.settings import Objective
from pipelines.means import FEW, cell
from pipelines.records import REWARD_PAIR, shards, sum_counts, uncut, write_rows
from pipelines.run.artifacts import Run, Stage, StageError, write_json

SPLITS = ("train", "held_out")
BASELINE_PAIRS = 20_000
"""Training pairs that the baselines read at most."""
OBJECTIVES = {"binary": "gsil_logistic", "bradley_terry": "dpo"}
"""The losses as presets of the table, with beta = 1: without a reference the reward itself stands for the log ratio, and the logistic
loss is the discriminator's softplus(-r(y+)) + softplus(r(y-)), DPO's the Bradley-Terry softplus(-(r(y+) - r(y-)))."""


def objective(loss: str) -> Objective:
    """The objective of a loss, a key of OBJECTIVES."""
    return Objective(name=OBJECTIVES[loss], beta=1.0)


def plan_pairs(name: str, positives: Stage, negatives: Stage, labels: Stage | None = None) -> Stage:
    """The stage that pairs responses to the same prompt.

    Args:
        name: of the stage.
        positives: samples or demonstrations. Preference pairs are both sides.
        negatives: samples.
        labels: scores of samples that are both sides: the best of a prompt are then paired with those that score less.
    """
    inputs = {"positives": positives, "negatives": negatives} | ({"labels": labels} if labels else {})
    return Stage(name, {"preferences": positives.settings.get("pairs", False)}, inputs, demand="the driver")


def make_pairs(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
    """The work of these stages: one shard of pairs for each shard of negatives.

    Raises:
        StageError: no pair is left to train on.
    """
    numbers = {}
    for stage in stages:
        for split in SPLITS:
            folder = run.directory(stage) / split
            folder.mkdir(exist_ok=True)
            for path in shards(run.directory(stage.inputs["negatives"]) / split):
                positives, negatives = _sides(run, stage, split, path)
                pairs, identical = paired(positives, negatives)
                alike = len(set(pq.read_table(path, columns=["id"])["id"].to_pylist()) - set(negatives))
                write_rows(folder / path.name, pairs, REWARD_PAIR, {"identical": identical, "alike": alike})
        counts = {split: sum_counts(shards(run.directory(stage) / split)) for split in SPLITS}
        if not counts["train"]["rows"]:
            dropped = {reason: counts["train"].get(reason, 0) for reason in ("identical", "alike")}
            judged = f"; the judge likes all samples alike of {dropped['alike']} prompts: raise responses.samples, choose another "
            judged += "best_of_n.golden, or name preferences.path"
            raise StageError(
                f"{stage.name}: no pair is left to train on: {dropped['identical']} had two equal sides"
                + (judged if "labels" in stage.inputs else "")
            )
        numbers[stage.name] = counts
    return numbers


Rows = dict[str, list[dict[str, Any]]]
"""Responses by the id of their prompt."""


def _sides(run: Run, stage: Stage, split: str, path: Path) -> tuple[Rows, Rows]:
    """Both sides of one shard of negatives."""
    if stage.settings["preferences"]:
        return _read(path, "response_ids"), _read(path, "rejected_ids")
    if "labels" in stage.inputs:
        scores = pq.read_table(run.directory(stage.inputs["labels"]) / split / path.name, columns=["id", "score"]).to_pylist()
        return told_apart(_read(path, "response_ids"), scores)
    folder = run.directory(stage.inputs["positives"]) / split
    # Of demonstrations there is one a prompt, of samples there may be so many that they are cut.
    same = folder / path.name
    return _read(same if same.exists() else folder / uncut(path), "response_ids"), _read(path, "response_ids")


def _read(path: Path, column: str) -> Rows:
    found: Rows = {}
    for row in pq.read_table(path, columns=["id", "prompt_ids", column]).to_pylist():
        found.setdefault(row["id"], []).append({"prompt_ids": row["prompt_ids"], "ids": row[column]})
    return found


def told_apart(responses: Rows, scores: Sequence[Mapping[str, Any]]) -> tuple[Rows, Rows]:
    """The best responses of each prompt, and those that score less; prompts whose responses all score alike are left out.

    Args:
        responses: by prompt.
        scores: `id, score` of all responses in the same order; those without a score are left out.
    """
    best, others = {}, {}
    given: dict[str, list[float | None]] = {}
    for row in scores:
        given.setdefault(row["id"], []).append(row["score"])
    for key, rows in responses.items():
        scored = [(score, row) for score, row in zip(given[key], rows, strict=True) if score is not None]
        top = max((score for score, _ in scored), default=0.0)
        if any(score < top for score, _ in scored):
            best[key] = [row for score, row in scored if score == top]
            others[key] = [row for score, row in scored if score < top]
    return best, others


def paired(positives: Rows, negatives: Rows) -> tuple[list[dict[str, Any]], int]:
    """Pairs the k-th positive of a prompt with its k-th negative; the side that has fewer begins anew.

    Returns:
        REWARD_PAIR rows, and how many were left out because both sides are equal.
    """
    pairs, identical = [], 0
    for key, below in negatives.items():
        above = positives.get(key, [])
        for k in range(max(len(above), len(below)) if above else 0):
            real, generated = above[k % len(above)], below[k % len(below)]
            if real["ids"] == generated["ids"]:
                identical += 1
            else:
                sides = {"prompt_ids": real["prompt_ids"], "real_ids": real["ids"], "generated_ids": generated["ids"]}
                pairs.append({"id": key, "sample": k} | sides)
    return pairs, identical


def doubts(name: str, numbers: Mapping[str, Any]) -> list[str]:
    """Warns of a reward model that tells held-out pairs apart no better than who has not read them."""
    if not numbers["pairs"]:
        return [f"{name}: no held-out pair says what the reward model learned"]
    found = []
    for count, what in ((numbers["trained_pairs"], "learned from"), (numbers["pairs"], "is measured on")):
        if count < FEW:
            found.append(f"{name}: {what} {count} pairs, too few to say anything")
    told, error = numbers["pair_accuracy"], numbers["stderr"] or 0.0
    if told - 0.5 < 2 * error:
        found.append(f"{name}: held-out pairs are told apart no better than by chance ({told:.3f} of {numbers['pairs']})")
    if numbers["pairs"] < FEW:
        return found
    for what, how in (("length", "the length alone tells"), ("origin", "the words alone tell")):
        alone = numbers[f"baseline_{what}"]
        # Above chance, or at least above a reward model that is not.
        if alone > max(0.5, min(told, 0.5 + 2 * error)) and told <= alone + 2 * error:
            found.append(f"{name}: {how} held-out pairs apart as well ({alone:.3f}, the reward model {told:.3f})")
    return found


def table(rewards: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows for a person, the header first."""
    columns = {"AUC": "auc", "right at 0": "accuracy", "calibration error": "calibration_error"}
    columns |= {"by the length alone": "baseline_length", "by the words alone": "baseline_origin"}
    rows = [["reward model", "pairs", "told apart", *columns]]
    for name, numbers in rewards.items():
        told = cell(numbers["pair_accuracy"], numbers["stderr"], 3)
        cells = ["" if numbers[key] is None else f"{numbers[key]:.3f}" for key in columns.values()]
        rows.append([name, str(numbers["pairs"]), told, *cells])
    return rows


def plan_metrics(trained: Mapping[str, Stage]) -> Stage:
    """The stage that measures reward models, by name."""
    return Stage("rewards/metrics", {"rewards": list(trained)}, dict(trained), demand="the driver", version=2)


def measure(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
    """The work of the stage: how well each reward model tells held-out pairs apart, and what would do as well without reading them."""
    (stage,) = stages
    found = {name: model_metrics(run, stage.inputs[name]) for name in stage.settings["rewards"]}
    write_json(run.directory(stage) / "metrics.json", found)
    return {stage.name: found}


def model_metrics(run: Run, trained: Stage) -> dict[str, Any]:
    """Numbers of one reward model on its held-out pairs; None where there is no such pair.

    Returns:
        pairs: how many; trained_pairs: those it learned from; pair_accuracy: share whose positive has the higher reward, and its stderr
        over prompts; auc; accuracy at zero, of a discriminator, whose zero means even odds; calibration_error of its odds, or of
        Bradley-Terry's that the positive is preferred. baseline_length and baseline_origin: pair_accuracy of response length alone,
        and of who wrote it by its words alone.
    """
    folder, pairs = run.directory(trained), run.directory(trained.inputs["data"])
    held_out = folder / "held_out.parquet"
    binary = trained.settings["objective"]["name"] == OBJECTIVES["binary"]
    trained_pairs = sum_counts(shards(pairs / "train"))["rows"]
    if not held_out.exists():
        names = ("pair_accuracy", "stderr", "auc", "accuracy", "calibration_error", "baseline_length", "baseline_origin")
        return dict.fromkeys(names) | {"pairs": 0, "trained_pairs": trained_pairs}
    rewards = pq.read_table(held_out)
    above, below = (rewards[f"rho_{side}"].to_numpy() for side in ("real", "generated"))
    train, test = (_token_ids(pairs / split) for split in SPLITS)
    lengths = [tuple(np.array([float(len(ids)) for ids in side]) for side in split) for split in (train, test)]
    vocabulary = 1 + max(int(max(ids)) for split in (train, test) for side in split for ids in side)
    baselines = {
        "baseline_length": metrics.length_scores(lengths[0], lengths[1]),  # type: ignore[arg-type]
        "baseline_origin": metrics.origin_scores(train, test, vocabulary),
    }
    margin = above - below
    return {
        "pairs": len(above),
        "trained_pairs": trained_pairs,
        "pair_accuracy": metrics.pair_accuracy(above, below),
        "stderr": metrics.clustered_error(np.sign(margin) / 2, rewards["id"].to_pylist()),
        "auc": metrics.auc(above, below),
        "accuracy": metrics.accuracy(above, below) if binary else None,
        "calibration_error": metrics.calibration_error(above, below) if binary else metrics.calibration_error(margin, -margin),
    } | {name: metrics.pair_accuracy(*scores) for name, scores in baselines.items()}


def _token_ids(folder: Path) -> tuple[list[Any], list[Any]]:
    """Both sides of the pairs of a split."""
    sides: tuple[list[Any], list[Any]] = ([], [])
    for path in shards(folder):
        if len(sides[0]) < BASELINE_PAIRS:
            table = pq.read_table(path, columns=["real_ids", "generated_ids"])
            for side, name in zip(sides, table.column_names, strict=True):
                side += [ids.values.to_numpy() for ids in table.column(name)]
    return sides
