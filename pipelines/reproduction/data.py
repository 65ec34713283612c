"""The rows of a reproduction, as stages of the usual layout: corpus, demonstrations, test problems, preference pairs.

seed-0/data/corpus/train            what the initial policy is pre-trained on: every style, partly wrong
seed-0/data/demonstrations/train    few, right, one style; held_out: problems on which settings are chosen
seed-0/data/test/held_out           problems that only chosen settings meet
seed-0/data/preferences/train       a right and a wrong sample of a policy to the same prompt (PREFERENCE)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipelines import base_model
from pipelines.chat import Chat
from pipelines.demonstrations import demonstration
from pipelines.evaluation import final_text
from pipelines.records import DEMONSTRATION, PREFERENCE, shards, write_rows
from pipelines.reproduction import problems
from pipelines.reproduction.settings import Problems
from pipelines.run.artifacts import Run, Stage, StageError
from pipelines.settings import Demonstrations

SHARD_ROWS = 512


def plan(name: str, base: Stage, seed: int, splits: Mapping[str, Problems], drawn: str) -> Stage:
    """A stage that writes generated problems.

    Args:
        name: of the stage.
        base: where the tokenizer is.
        seed: of what is drawn.
        splits: "train", "held_out" -> what is drawn.
        drawn: tells draws of one seed apart; the same one draws the same questions, however they are answered.
    """
    asked = {split: given.identity() for split, given in splits.items()}
    return Stage(name, {"generator": problems.VERSION, "seed": seed, "drawn": drawn, "splits": asked}, {"base": base})


def write(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
    """The work of these stages."""
    import ray

    task = ray.remote(_write)
    asked = [(stage, base_model.tokenizer(run, stage.inputs["base"]), run.directory(stage)) for stage in stages]
    counts = ray.get([task.remote(stage.name, dict(stage.settings), tokenizer, folder) for stage, tokenizer, folder in asked])
    return {stage.name: found for stage, found in zip(stages, counts, strict=True)}


def _write(name: str, settings: Mapping[str, Any], tokenizer: str, folder: Path) -> dict[str, Any]:
    chat, counts = Chat(tokenizer), {}
    for split, given in settings["splits"].items():
        asked = Problems(**given)
        rows, seed = [], f"{settings['seed']}:{settings['drawn']}:{split}"
        layout = Demonstrations(max_prompt_tokens=asked.max_prompt_tokens, max_tokens=asked.max_tokens)
        for number, style in enumerate(asked.styles):
            count = asked.count // len(asked.styles) + (number < asked.count % len(asked.styles))
            drawn = problems.problems(count, f"{seed}:{style}", asked.split, tuple(asked.lengths), asked.careless, style)
            rows += [demonstration(row, f"{name}/{split}:{style}:{k}", layout, chat) for k, row in enumerate(drawn, start=1)]
        (folder / split).mkdir()
        for number, start in enumerate(range(0, len(rows), SHARD_ROWS)):
            write_rows(folder / split / f"{number:05d}.parquet", map(_without_flag, rows[start : start + SHARD_ROWS]), DEMONSTRATION)
        counts[split] = len(rows)
    return counts


def _without_flag(row: Mapping[str, Any]) -> dict[str, Any]:
    assert not row["truncated"], row
    return {key: value for key, value in row.items() if key != "truncated"}


def plan_preferences(name: str, samples: Stage, demonstrations: Stage) -> Stage:
    """A stage that pairs samples of a policy by the checker: of every prompt that has both, the first right one and the first wrong one.

    Args:
        name: of the stage.
        samples: several of a prompt.
        demonstrations: of the same prompts, right ones.
    """
    return Stage(name, {"pairs": True}, {"samples": samples, "demonstrations": demonstrations}, demand="the driver", version=2)


def write_preferences(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
    """The work of these stages.

    Raises:
        StageError: no prompt has both.
    """
    numbers = {}
    for stage in stages:
        (run.directory(stage) / "train").mkdir()
        kept = prompts = 0
        for path in shards(run.directory(stage.inputs["samples"]) / "train"):
            gold = {
                row["id"]: row for row in pq.read_table(run.directory(stage.inputs["demonstrations"]) / "train" / path.name).to_pylist()
            }
            grouped: dict[str, list[dict[str, Any]]] = {}
            for row in pq.read_table(path, columns=["id", "response", "response_ids"]).to_pylist():
                grouped.setdefault(row["id"], []).append(row)
            pairs = [pair for key, drawn in grouped.items() if (pair := preference(gold[key], drawn))]
            kept, prompts = kept + len(pairs), prompts + len(grouped)
            write_rows(run.directory(stage) / "train" / path.name, pairs, PREFERENCE)
        if not kept:
            raise StageError(f"{stage.name}: no prompt has a right and a wrong sample: draw more samples a prompt")
        numbers[stage.name] = {"train": kept, "prompts": prompts}
    return numbers


def preference(gold: Mapping[str, Any], drawn: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A PREFERENCE row of one prompt, or None if it has not both."""
    answer = final_text(gold["response"])
    right, wrong = ([row for row in drawn if (final_text(row["response"]) == answer) == wanted] for wanted in (True, False))
    if not right or not wrong:
        return None
    chosen = {"response": right[0]["response"], "response_ids": right[0]["response_ids"]}
    return dict(gold) | chosen | {"rejected": wrong[0]["response"], "rejected_ids": wrong[0]["response_ids"]}
