"""Held-out answers of a policy, scored: one row each on disk, the mean with its standard error in the manifest.

INPUT  sft/samples/held_out (SAMPLE), demonstrations/held_out (DEMONSTRATION)
OUTPUT sft/evaluation/scores.parquet: id, score
"""

import logging
import re
from decimal import Decimal, InvalidOperation
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.means import mean_and_error
from pipelines.records import shards, uncut, write_rows
from pipelines.run.artifacts import Run, Stage, StageError
from pipelines.settings import Evaluation

SCORES = pa.schema({"id": pa.string(), "score": pa.float64()})
NUMBER = re.compile(r"-?\$?\s*(-?[\d,]*\.?\d+)")
MORE = re.compile(r"\s*[/:]\s*\d|[eE][+-]?\d")
"""Behind a number: it was only the first part of one."""
log = logging.getLogger(__name__)


def plan(name: str, samples: Stage, demonstrations: Stage, evaluation: Evaluation, before: Stage | None = None) -> Stage:
    """The stage that scores the samples of a policy.

    Args:
        name: of the stage.
        samples: of held-out prompts.
        demonstrations: of the same prompts.
        evaluation: the metric.
        before: the evaluation of the policy before it: what it gains on that is told, too.
    """
    inputs = {"samples": samples, "demonstrations": demonstrations} | ({"before": before} if before else {})
    return Stage(name, {"metric": evaluation.metric}, inputs, demand="the driver", version=3)


def evaluate(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
    """The work of these stages."""
    return {stage.name: _evaluate(run, stage) for stage in stages}


def _evaluate(run: Run, stage: Stage) -> dict[str, Any]:
    metric = stage.settings["metric"]
    scores, truncated, unscored = [], 0, list[str]()
    for path in shards(run.directory(stage.inputs["samples"]) / "held_out"):
        real = pq.read_table(run.directory(stage.inputs["demonstrations"]) / "held_out" / uncut(path), columns=["id", "source", "response"])
        gold = {row["id"]: row for row in real.to_pylist()}
        for row in pq.read_table(path, columns=["id", "response", "finish_reason"]).to_pylist():
            truncated += row["finish_reason"] == "length"
            if metric != "none":
                right = METRICS[metric](row["response"], gold[row["id"]]["response"])
                if right is None:
                    unscored.append(gold[row["id"]]["source"])
                else:
                    scores.append({"id": row["id"], "score": float(right)})
    if unscored:
        why = f"{stage.name}: {len(unscored)} demonstrations have no answer after '####', the first is {unscored[0]}"
        if not scores:
            raise StageError(f"{why}: set evaluation.metric=none")
        log.warning("%s: they are not in the accuracy of the other %d", why, len(scores))
    write_rows(run.directory(stage) / "scores.parquet", scores, SCORES)
    mean, error = mean_and_error([row["score"] for row in scores])
    found = {"accuracy": mean, "stderr": error, "n": len(scores), "truncated": truncated, "unscored": len(unscored)}
    return found | ({"gain": _gain(run, stage.inputs["before"], scores)} if "before" in stage.inputs else {})


def _gain(run: Run, before: Stage, scores: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean difference to an earlier policy, with its standard error, pair by pair of answers to the same prompt: most prompts are as
    hard for both, so that it says more than two accuracies beside each other."""
    then = {row["id"]: row["score"] for row in pq.read_table(run.directory(before) / "scores.parquet").to_pylist()}
    differences = [row["score"] - then[row["id"]] for row in scores if row["id"] in then]
    mean, error = mean_and_error(differences)
    return {"over": before.name.rpartition("/")[0], "mean": mean, "stderr": error, "n": len(differences)}


def check_answers(run: Run, demonstrations: Stage, setting: str, metric: str, instead: str) -> None:
    """Stops before anything is trained or sampled where exact answers are asked for and the demonstrations have none.

    Args:
        run: the run.
        demonstrations: the finished stage.
        setting: the one that asks.
        metric: one of METRICS.
        instead: what a person may set.

    Raises:
        StageError: no demonstration of the first file of a split has an answer after "####".
    """
    for split in ("train", "held_out"):
        for path in shards(run.directory(demonstrations) / split)[:1]:
            responses = pq.read_table(path, columns=["response"])["response"].to_pylist()
            if all(METRICS[metric](response, response) is None for response in responses):
                what = "number" if metric == "exact_answer" else "text"
                raise StageError(f"{setting}={metric}, but no demonstration ({split}) has a {what} after '####': {instead}")


def exact_answer(response: str, demonstration: str) -> bool | None:
    """Whether the number after the last `####` of a response is that of the demonstration (the GSM8K layout), which may have none."""
    gold = final_number(demonstration)
    return None if gold is None else final_number(response) == gold


def exact_text(response: str, demonstration: str) -> bool | None:
    """Whether the text after the last `####` of a response is that of the demonstration, which may have none."""
    gold = final_text(demonstration)
    return None if gold is None else final_text(response) == gold


METRICS = {"exact_answer": exact_answer, "exact_text": exact_text}


def final_text(text: str) -> str | None:
    """What stands after the last `####` that anything stands after; None if there is none."""
    text = text.rstrip()
    # Cut in the middle of saying it once more.
    while text.endswith("####"):
        text = text.removesuffix("####").rstrip()
    _, marker, tail = text.rpartition("####")
    return (tail.strip() or None) if marker else None


def final_number(text: str) -> Decimal | None:
    """The number in the first line of the `final_text`, without thousands separators and currency; None if there is none."""
    found = NUMBER.search((final_text(text) or "").partition("\n")[0])
    if not found or MORE.match(found.string, found.end()):
        return None
    try:
        sign = -1 if found.group(0).startswith("-") and not found.group(1).startswith("-") else 1
        return sign * Decimal(found.group(1).replace(",", "")).normalize()
    except InvalidOperation:
        return None
