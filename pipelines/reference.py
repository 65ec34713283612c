"""Pairs for training: each demonstration with the samples for its prompt, and the reference policy's log-probs of both.

    demonstrations/train/00000.parquet ---.
    iteration-1/negatives/train/00000 ----+--> drop equal pairs --> score --> iteration-1/pairs/train/00000.parquet (PAIR)
    (window 2: also iteration-0's) -------'

Shards of all inputs hold the same prompts, so the join is local to a shard.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from actors.allocator import environment
from actors.settings import Objective, Scoring, Training
from pipelines import base_model
from pipelines.records import PAIR, shards, sum_counts, uncut, write_rows
from pipelines.run.artifacts import Run, Stage, Work
from pipelines.workers.shards import Shard, map_shards

log = logging.getLogger(__name__)
SPLITS = ("train", "held_out")


def plan(
    name: str,
    demonstrations: Stage,
    negatives: tuple[Stage, ...],
    reference: Stage,
    truncated: str,
    training: Training,
    objective: Objective,
    scoring: Scoring,
) -> Stage:
    """The stage that pairs and scores.

    Args:
        name: of the stage.
        demonstrations: the real side.
        negatives: the generated side, this iteration's last; held-out pairs are made of these alone. Without any, the demonstrations
            are preference pairs and bring it with them.
        reference: the policy in the denominator.
        truncated: "keep" or "drop" pairs whose sample was cut.
        training: the log-probs are computed in its precision.
        objective: KTO also wants a response to another prompt.
        scoring: the pool.
    """
    settings = {"truncated": truncated, "precision": training.precision, "mismatched": objective.function == "kto"}
    inputs = {"demonstrations": demonstrations, "reference": reference} | {f"negatives-{i}": s for i, s in enumerate(negatives)}
    return Stage(name, settings, inputs, demand=scoring.demand(), version=2)


def score(scoring: Scoring, precision: str, longest: int, trust_remote_code: bool) -> Work:
    """Returns the work of such stages, which share a pool of actors.

    Args:
        scoring: the pool.
        precision: of the training that reads the log-probs.
        longest: no prompt with one of its responses is longer, tokens.
        trust_remote_code: run Python code that comes with the model.
    """

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        weights = {stage.name: base_model.weights(run, stage.inputs["reference"]) for stage in stages}
        arguments = {
            "weights": weights[stages[0].name],
            "scoring": scoring,
            "precision": precision,
            "longest": longest,
            "trust_remote_code": trust_remote_code,
        }
        tasks = [task for stage in stages for task in _tasks(run, stage, weights[stage.name])]
        env = environment(precision, scoring.num_cpus, scoring.num_gpus)
        numbers = map_shards(run, tasks, ScoreShards, arguments, scoring, env)
        for stage in stages:
            numbers[stage.name] |= {split: sum_counts(shards(run.directory(stage) / split)) for split in SPLITS}
            for split in SPLITS:
                made = numbers[stage.name][split]
                if lost := made.get("identical", 0) + made.get("dropped", 0):
                    said = "%s: %d of %d %s samples make no pair: %d equal their demonstration, %d were cut or have no partner"
                    log.info(said, stage.name, lost, lost + made["rows"], split, made.get("identical", 0), made.get("dropped", 0))
        return numbers

    return work


def _tasks(run: Run, stage: Stage, weights: str) -> list[Shard]:
    drop = stage.settings["truncated"] == "drop"
    options = {"weights": weights, "drop_truncated": drop, "mismatched": stage.settings["mismatched"]}
    return [
        Shard(stage, inputs, run.directory(stage) / split / Path(inputs[-1]).name, options, rows=sum_counts(map(Path, inputs))["rows"])
        for split in SPLITS
        for inputs in _aligned(run, stage, split)
    ]


def _aligned(run: Run, stage: Stage, split: str) -> list[tuple[str, ...]]:
    """For each shard the demonstrations' file and then the negatives' files."""
    sides = [s for role, s in sorted(stage.inputs.items()) if role.startswith("negatives-")]
    if split == "held_out":
        sides = sides[-1:]
    folders = [run.directory(s) / split for s in (stage.inputs["demonstrations"], *sides)]
    # Negatives are drawn for a part of the held-out prompts only. Without any, the demonstrations stand alone.
    names = [(uncut(path), *[path.name] * len(sides)) for path in shards(folders[-1])]
    return [tuple(str(folder / name) for folder, name in zip(folders, row, strict=True)) for row in names]


class ScoreShards:
    """The actor: a scorer, and the files around it."""

    def __init__(self, **arguments: Any):
        from actors.scorer import Scorer

        self.load, self.arguments = Scorer, arguments
        self.scorer = Scorer(**arguments)

    def change(self, options: dict[str, Any]) -> None:
        """Loads another reference, if the next shard is of one."""
        if options["weights"] != self.arguments["weights"]:
            self.arguments["weights"] = options["weights"]
            # The one before goes first: the two need not fit together.
            del self.scorer
            self.scorer = self.load(**self.arguments)

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        """Pairs and scores one shard.

        INPUT  DEMONSTRATION rows and SAMPLE rows, one file or more; or PREFERENCE rows alone
        OUTPUT PAIR rows; counts of `identical` and `dropped` (cut) samples
        """
        from actors.learner.batches import Example

        table = pq.read_table(inputs[0])
        real = {row["id"]: row for row in table.select(["id", "prompt_ids", "response_ids"]).to_pylist()}
        columns = ["id", "iteration", "sample", "response_ids", "finish_reason"]
        samples = [row for path in inputs[1:] for row in pq.read_table(path, columns=columns).to_pylist()]
        if not inputs[1:]:
            rejected = table.select(["id", "rejected_ids"]).rename_columns(["id", "response_ids"]).to_pylist()
            samples = [row | {"iteration": 0, "sample": 0, "finish_reason": "stop"} for row in rejected]
        pairs, identical, dropped = [], 0, 0
        for sample in samples:
            row = real[sample["id"]]
            if sample["response_ids"] == row["response_ids"]:
                identical += 1
            elif options["drop_truncated"] and sample["finish_reason"] == "length":
                dropped += 1
            else:
                ids = {"prompt_ids": row["prompt_ids"], "real_ids": row["response_ids"], "generated_ids": sample["response_ids"]}
                pairs.append({"id": sample["id"], "iteration": sample["iteration"], "sample": sample["sample"]} | ids)
        names = ["real", "generated"]
        if options["mismatched"]:
            names.append("mismatched")
            pairs, alone = mismatched(pairs)
            dropped += alone
        examples = [Example(p["id"], p["prompt_ids"], tuple(p[f"{name}_ids"] for name in names)) for p in pairs]
        logps = self.scorer(examples, lambda responses: tell(responses // len(names)))
        rows = [pair | {f"ref_logp_{name}": v for name, v in zip(names, row, strict=True)} for pair, row in zip(pairs, logps, strict=True)]
        write_rows(Path(output), rows, PAIR, {"identical": identical, "dropped": dropped})


def mismatched(pairs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Gives every pair a response to another prompt, of the next row that has one: its real and its generated response in turn.

    Returns:
        the pairs with `mismatched_ids`, and how many were left out because all pairs have the same prompt.
    """
    firsts = [k for k, pair in enumerate(pairs) if pair["prompt_ids"] != pairs[k - 1]["prompt_ids"]]
    if not firsts:
        return [], len(pairs)
    found = []
    for k, pair in enumerate(pairs):
        other = pairs[next((first for first in firsts if first > k), firsts[0])]
        found.append(pair | {"mismatched_ids": other["real_ids" if k % 2 == 0 else "generated_ids"]})
    return found, 0
