"""What can be said of a policy's answers without a judge: mean scores, lengths, variety, and the KL divergence from a reference.

NAME/samples --> scores (scoring.py), one stage a measure ---.
NAME/draws   --> log-probs of the policy and the reference ---+--> NAME/measures: numbers
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from actors.allocator import environment
from actors.settings import Scoring
from pipelines import base_model
from pipelines.means import CUT, FEW, cell, cut_off, mean_and_error
from pipelines.records import SCORE, shards, write_rows
from pipelines.run.artifacts import Run, Stage, Work, write_json
from pipelines.scoring import PATTERN
from pipelines.workers.shards import Shard, map_shards

SPLIT = "train"
ORDERS = (1, 2, 3)
"""Lengths of the n-grams whose variety is told."""


def plan_log_probs(name: str, samples: Stage, model: Stage, base: Stage, precision: str, scoring: Scoring) -> Stage:
    """The stage that computes the log-probs of samples under a model.

    Args:
        name: of the stage.
        samples: whose token ids.
        model: a policy.
        base: where the tokenizer of that policy is.
        precision: of the forward pass.
        scoring: the pool.
    """
    return Stage(name, {"precision": precision}, {"samples": samples, "model": model, "base": base}, demand=scoring.demand())


def log_probs(scoring: Scoring, longest: int, trust_remote_code: bool) -> Work:
    """Returns the work of the stage.

    Args:
        scoring: the pool.
        longest: no prompt with one of its responses is longer, tokens.
        trust_remote_code: run Python code that comes with the model.
    """

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        (stage,) = stages
        samples = stage.inputs["samples"]
        base_model.check_tokens(run, samples.inputs["base"], stage.inputs["base"], "name another answers.reference")
        arguments = {
            "weights": base_model.weights(run, stage.inputs["model"]),
            "scoring": scoring,
            "precision": stage.settings["precision"],
            "longest": longest,
            "trust_remote_code": trust_remote_code,
        }
        tasks = [
            Shard(stage, (str(path),), run.directory(stage) / SPLIT / path.name, {}, pq.read_metadata(path).num_rows)
            for path in shards(run.directory(samples) / SPLIT)
        ]
        env = environment(stage.settings["precision"], scoring.num_cpus, scoring.num_gpus)
        return map_shards(run, tasks, LogProbShards, arguments, scoring, env)

    return work


class LogProbShards:
    """The actor: a scorer, and the files around it."""

    def __init__(self, **arguments: Any):
        from actors.scorer import Scorer

        self.scorer = Scorer(**arguments)

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        """Log-probs of one shard.

        INPUT  SAMPLE rows
        OUTPUT SCORE rows; the score is the summed log-prob of the response, nats
        """
        from actors.learner.batches import Example

        rows = pq.read_table(inputs[0], columns=["id", "sample", "prompt_ids", "response_ids"]).to_pylist()
        examples = [Example(row["id"], tuple(row["prompt_ids"]), (tuple(row["response_ids"]),)) for row in rows]
        made = [
            {"id": row["id"], "sample": row["sample"], "score": value, "reason": None}
            for row, (value,) in zip(rows, self.scorer(examples, tell), strict=True)
        ]
        write_rows(Path(output), made, SCORE)


def plan(name: str, samples: Stage, scores: Mapping[str, Stage], own: Stage | None = None, reference: Stage | None = None) -> Stage:
    """The stage that sums up.

    Args:
        name: of the stage.
        samples: the answers.
        scores: of the answers, by measure.
        own: log-probs of free samples under the policy itself.
        reference: and under the reference.
    """
    inputs = {"samples": samples} | {f"score-{measure}": stage for measure, stage in scores.items()}
    if own and reference:
        inputs |= {"own": own, "reference": reference}
    return Stage(name, {}, inputs, demand="the driver", version=2)


def measure(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
    """The work of the stage."""
    (stage,) = stages
    found: dict[str, Any] = {"measures": {}, "kl": None}
    for role, scores in stage.inputs.items():
        if role.startswith("score-"):
            values = _scores(run, scores)
            found["measures"][role.removeprefix("score-")] = _mean({key: v for key, v in values.items() if v is not None}, len(values))
    if "own" in stage.inputs:
        own, reference = (_scores(run, stage.inputs[role]) for role in ("own", "reference"))
        found["kl"] = _mean({key: value - reference[key] for key, value in own.items()}, len(own))
    found["texts"] = texts([row for path in shards(run.directory(stage.inputs["samples"]) / SPLIT) for row in _answers(path)])
    write_json(run.directory(stage) / "measures.json", found)
    return {stage.name: found}


def _answers(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path, columns=["response", "response_ids", "finish_reason"]).to_pylist()


def _scores(run: Run, stage: Stage) -> dict[tuple[str, int], Any]:
    rows = [row for path in shards(run.directory(stage) / SPLIT) for row in pq.read_table(path).to_pylist()]
    return {(row["id"], row["sample"]): row["score"] for row in rows}


def _mean(values: Mapping[tuple[str, int], float], of: int) -> dict[str, Any]:
    """Of scores by prompt and sample: the samples of a prompt are no independent answers, it is prompts that the error is over."""
    by_prompt: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        by_prompt.setdefault(prompt, []).append(value)
    mean, error = mean_and_error([statistics.fmean(scores) for scores in by_prompt.values()])
    return {"mean": mean, "stderr": error, "n": len(values), "prompts": len(by_prompt), "unscored": of - len(values)}


def texts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lengths and variety of responses: `tokens` (mean, median, 90th percentile), the share that was cut at the limit, and distinct-n, the
    share of n-grams of words that are different (Li et al. 2016, arXiv 1510.03055), over all responses together."""
    lengths = sorted(len(row["response_ids"]) for row in rows)
    words = [row["response"].split() for row in rows]
    variety = {}
    for n in ORDERS:
        grams = [tuple(line[k : k + n]) for line in words for k in range(len(line) - n + 1)]
        variety[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else None
    return {
        "n": len(rows),
        "tokens": statistics.fmean(lengths) if lengths else None,
        "tokens_median": statistics.median(lengths) if lengths else None,
        "tokens_90": lengths[min(len(lengths) - 1, int(0.9 * len(lengths)))] if lengths else None,
        "truncated": sum(row["finish_reason"] == "length" for row in rows) / max(1, len(rows)),
    } | variety


def table(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A table for a person, a policy a row; the header first."""
    measures = list(dict.fromkeys(name for numbers in found.values() for name in numbers["measures"]))
    kl = any(numbers["kl"] for numbers in found.values())
    rows = [["policy", *measures, *(["KL, nats"] if kl else []), "tokens", "cut", "distinct 1, 2, 3", "n"]]
    for name, numbers in found.items():
        told = numbers["texts"]
        shown = [_shown(numbers["measures"].get(measure)) for measure in measures] + ([_shown(numbers["kl"])] if kl else [])
        variety = " ".join("" if told[f"distinct_{n}"] is None else f"{told[f'distinct_{n}']:.2f}" for n in ORDERS)
        rows.append([name, *shown, f"{told['tokens'] or 0:.0f}", f"{told['truncated']:.2f}", variety, str(told["n"])])
    return rows


def _shown(numbers: Mapping[str, Any] | None) -> str:
    if not numbers:
        return ""
    return cell(numbers["mean"], numbers["stderr"], 3) + (f" of {numbers['n']}" if numbers["unscored"] else "")


def shares(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[float | None, int]]:
    """The measures that are shares of right answers, each with how many prompts it is over; `found` as for `table`."""
    scored = [each for numbers in found.values() for each in numbers["measures"].items()]
    return [(own["mean"], own.get("prompts", 0)) for name, own in scored if name == "exact_answer" or name.startswith(PATTERN)]


def doubts(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Warns of means over fewer answers than there are, or over few prompts, and of answers that were cut; a policy a key."""
    told = []
    for policy, numbers in found.items():
        if numbers["texts"]["truncated"] > CUT:
            told.append(cut_off(f"{policy}/answers", numbers["texts"]["truncated"], "answers.max_new_tokens"))
        for measure, scored in numbers["measures"].items():
            if scored["unscored"]:
                told.append(f"{policy}: {measure} has no score of {scored['unscored']} of {scored['unscored'] + scored['n']} answers")
    for measure in dict.fromkeys(name for numbers in found.values() for name in numbers["measures"]):
        over = {policy: numbers["measures"][measure].get("prompts") for policy, numbers in found.items() if measure in numbers["measures"]}
        if len(set(over.values())) > 1:
            counts = ", ".join(f"{count} of {policy}" for policy, count in over.items())
            told.append(f"{measure} is over different prompts ({counts}): one took prompts that another could not, or has no score of")
    prompts = [scored.get("prompts", FEW) for numbers in found.values() for scored in numbers["measures"].values()]
    if min(prompts, default=FEW) < FEW:
        told.append(f"scores of answers to {min(prompts)} prompts only: means and standard errors over so few say little")
    return told
