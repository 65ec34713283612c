"""Scores of responses on disk, by reward models of this run, published ones, or programs: one stage a scorer and a set of responses.

    best_of_n/samples/held_out/00000.parquet (SAMPLE) --> best_of_n/init-sft-0/held_out/00000.parquet (SCORE)

A response that a scorer fails on has no score and a reason: it is set aside and counted, never taken for 0.
"""

import difflib
import functools
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from actors.generator import environment
from actors.settings import RewardScoring
from pipelines import base_model
from pipelines.records import SCORE, shards, sum_counts, uncut, write_rows
from pipelines.run.artifacts import Run, Stage, StageError, Work
from pipelines.scorers import ByModel, Row, Scored, by_function, by_pattern, by_url, exact_answers, function
from pipelines.workers.shards import Shard, map_shards

log = logging.getLogger(__name__)
PATTERN = "regex:"


def plan(
    name: str,
    responses: Stage,
    demonstrations: Stage,
    scorer: Stage | str,
    precision: str,
    scoring: RewardScoring,
    splits: Sequence[str] = ("held_out", "train"),
) -> Stage:
    """A stage that scores responses.

    Args:
        name: of the stage.
        responses: samples, or demonstrations.
        demonstrations: of the same prompts.
        scorer: the training stage of a reward model; or a reward model's directory or hub id, "exact_answer", "regex:PATTERN",
            "module:function", or the URL of a service.
        precision: of a reward model, "float32" or "bfloat16".
        scoring: the pool.
        splits: that are scored, where there are responses.

    Raises:
        StageError: there is no such scorer, or the model is no reward model.
    """
    inputs = {"responses": responses, "demonstrations": demonstrations}
    settings: dict[str, Any] = {"precision": precision, "splits": list(splits)}
    if isinstance(scorer, Stage):
        inputs["reward"] = scorer
    else:
        settings |= {"scorer": scorer, "identity": _identity(scorer)}
    return Stage(name, settings, inputs, demand=scoring.demand(), version=2)


def is_function(scorer: str) -> bool:
    """Whether a scorer's name is that of a Python function, `module:function`."""
    return ":" in scorer and "://" not in scorer and not Path(scorer).exists()


def is_url(scorer: str) -> bool:
    """Whether a scorer's name is the address of a service."""
    return scorer.startswith(("http://", "https://"))


def _identity(scorer: str) -> Any:
    """What a scorer is, beside its name."""
    if scorer == "exact_answer" or is_url(scorer):
        return None
    if scorer.startswith(PATTERN):
        try:
            re.compile(scorer.removeprefix(PATTERN))
        except re.error as error:
            raise StageError(f"scorer {scorer!r} is no regular expression: {error}") from None
        return None
    if is_function(scorer):
        file = sys.modules[function(scorer, str(Path.cwd())).__module__].__file__
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else None
    check_reward_model(scorer)
    return base_model.files(scorer)


def check_reward_model(path: str) -> None:
    """Reads the config of a published reward model, before anything heavy is loaded.

    Raises:
        StageError: there is no such model, it is a language model, or it has more than one label.
    """
    # Ids of the hub are owner/name; nobody is asked about what cannot be one.
    if not Path(path).exists() and (path.startswith(("/", ".", "~")) or path.count("/") != 1):
        near = "; did you mean exact_answer?" if difflib.get_close_matches(path, ["exact_answer"]) else ""
        raise StageError(
            f"scorer {path!r} is no reward model's directory or hub id (owner/name), nor exact_answer, nor module:function{near}"
        )
    try:
        if Path(path).exists():
            file = Path(path, "config.json")
        else:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(path, "config.json"))
        config = json.loads(file.read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001
        # The hub's client raises a dozen kinds.
        raise StageError(
            f"scorer {path!r} is no reward model's directory or hub id, nor exact_answer, nor module:function: {str(error).splitlines()[0]}"
        ) from None
    check_one_label(config, f"scorer {path!r}")


def check_one_label(config: Mapping[str, Any], what: str) -> None:
    """Reads of a model's config.json whether it is a reward model.

    Args:
        config: its content.
        what: is asked about, in errors.

    Raises:
        StageError: it is a language model, or has more than one label.
    """
    kinds = config.get("architectures") or ["a model that does not say what it is"]
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise StageError(f"{what} is {kinds[0]}: a reward model is a ...ForSequenceClassification with one label")
    # transformers' own default is two.
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if labels != 1:
        raise StageError(f"{what} has {labels} labels, a reward model has one")


def score(scoring: RewardScoring, longest: int, trust_remote_code: bool) -> Work:
    """Returns the work of scoring stages, which share a pool of actors: all by the same scorer, or in transformers by any.

    Args:
        scoring: the pool.
        longest: no prompt with one of its responses is longer, tokens.
        trust_remote_code: run Python code that comes with a model.
    """

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        # An engine holds one reward model for good.
        changes = scoring.backend == "transformers"
        scorers = {_scorer(run, stage) for stage in stages}
        assert changes or len(scorers) == 1, "an engine holds one reward model"
        scorer, ours = _scorer(run, stages[0])
        arguments = {
            "scorer": scorer,
            "ours": ours,
            "precision": stages[0].settings["precision"],
            "scoring": scoring,
            "longest": longest,
            "trust_remote_code": trust_remote_code,
            "folder": str(Path.cwd()),
        }
        tasks = [task for stage in stages for task in _tasks(run, stage, changes)]
        numbers = map_shards(run, tasks, ScoreResponses, arguments, scoring, environment(scoring))
        for stage in stages:
            counts = sum_counts(run.directory(stage).glob("*/*.parquet"))
            numbers[stage.name] |= counts
            for name, text in TEMPLATES.items():
                if counts.get(name):
                    log.warning("%s: %s", stage.name, text)
                    break
            if counts.get("unscored"):
                log.warning("%s: %d of %d responses have no score: %s", stage.name, counts["unscored"], counts["rows"], _reason(run, stage))
            if counts.get("unscored", 0) == counts["rows"]:
                reason = _reason(run, stage)
                for path in run.directory(stage).glob("*/*.parquet"):
                    # They would be taken for done when the scorer has been mended.
                    path.unlink()
                raise StageError(f"{stage.name}: not one response could be scored: {reason}")
        return numbers

    return work


def _reason(run: Run, stage: Stage) -> str:
    """Why the first response without a score has none."""
    files = run.directory(stage).glob("*/*.parquet")
    return next(r for file in sorted(files) for r in pq.read_table(file, columns=["reason"])["reason"].to_pylist() if r)


def _scorer(run: Run, stage: Stage) -> tuple[str, bool]:
    """What scores in a stage, and whether it is a reward model of this run."""
    reward = stage.inputs.get("reward")
    return (str(run.directory(reward) / "reward"), True) if reward else (base_model.absolute(stage.settings["scorer"]), False)


def _tasks(run: Run, stage: Stage, changes: bool) -> list[Shard]:
    responses, demonstrations = run.directory(stage.inputs["responses"]), run.directory(stage.inputs["demonstrations"])
    options = dict(zip(("scorer", "ours"), _scorer(run, stage), strict=True)) if changes else {}
    return [
        Shard(
            stage,
            (str(path), str(demonstrations / split / uncut(path))),
            run.directory(stage) / split / path.name,
            options,
            pq.read_metadata(path).num_rows,
        )
        for split in stage.settings["splits"]
        for path in shards(responses / split)
    ]


TEMPLATES = {
    "untemplated": "the reward model has no chat template, responses are written in a plain one (User: ... Assistant: ...): if it was "
    "trained on another layout, write that as chat_template.jinja beside its weights",
    "retemplated": "the reward model reads other tokens than the policy wrote: responses are written in its own chat template",
}
"""What shards count of a reward model of others, the more important first."""


class ScoreResponses:
    """The actor: a scorer, and the files around it."""

    def __init__(self, scorer: str, ours: bool, **others: Any):
        self.named, self.others = (scorer, ours), others
        self.scorer = _loaded(scorer, ours, **others)

    def change(self, options: dict[str, Any]) -> None:
        """Loads another scorer, if the next shard is for one."""
        if (named := (options.get("scorer", self.named[0]), options.get("ours", self.named[1]))) != self.named:
            # The one before goes first: the two need not fit together.
            del self.scorer
            self.named, self.scorer = named, _loaded(*named, **self.others)

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        """Scores one shard.

        INPUT  SAMPLE (or DEMONSTRATION) rows, DEMONSTRATION rows of the same prompts
        OUTPUT SCORE rows, one for each of the first
        """
        present = pq.read_schema(inputs[0]).names
        wanted = ("id", "sample", "prompt", "prompt_ids", "response", "response_ids", "finish_reason")
        rows = pq.read_table(inputs[0], columns=[name for name in wanted if name in present]).to_pylist()
        results = self.scorer(rows, inputs[1], tell)
        counts = {"unscored": sum(score is None for score, _ in results)}
        counts |= {name: int(getattr(self.scorer, name, False)) for name in TEMPLATES}
        made = [
            {"id": row["id"], "sample": row.get("sample", 0), "score": score, "reason": reason}
            for row, (score, reason) in zip(rows, results, strict=True)
        ]
        write_rows(Path(output), made, SCORE, counts)


def _loaded(scorer: str, ours: bool, folder: str, **model: Any) -> Callable[[Sequence[Row], str, Callable[[int], None]], list[Scored]]:
    if ours:
        return ByModel(scorer, ours, **model)
    if scorer == "exact_answer":
        return exact_answers
    if scorer.startswith(PATTERN):
        return functools.partial(by_pattern, scorer.removeprefix(PATTERN))
    if is_url(scorer):
        return functools.partial(by_url, scorer)
    if is_function(scorer):
        return functools.partial(by_function, function(scorer, folder))
    return ByModel(scorer, ours, **model)
