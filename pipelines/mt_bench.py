"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): questions of two turns, answered by every policy, graded from 1 to 10 by a judge.

question.jsonl --> first turn --> answers --> second turn, behind the first answer --> answers
                                     '----------------------------------------------------'--> grades, with the reference
                                                                                      answers where there are some
"""

import json
import logging
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.judge import prompts
from actors.judge.verdicts import read_grade
from pipelines import base_model
from pipelines.chat import Chat
from pipelines.data import sources
from pipelines.judges.settings import Judge, JudgeModel, MtBench
from pipelines.judging import QUESTION, check_read
from pipelines.means import mean_and_error
from pipelines.records import DEMONSTRATION, shards, spread, write_rows
from pipelines.run.artifacts import Run, Stage, StageError, Work
from pipelines.run.keeping import Need

log = logging.getLogger(__name__)

TURNS = (1, 2)
QUESTIONS = 80
"""All of MT-Bench."""
GRADE = pa.schema(
    {
        **{name: pa.string() for name in ("id", "policy", "category")},
        "turn": pa.int32(),
        "grade": pa.float64(),
        **{name: pa.string() for name in ("question", "answer", "failed")},
    }
)
"""`grade` is null where the answer could not be read, or failed."""


def plan_turn(name: str, turn: int, base: Stage, settings: MtBench, before: Stage | None) -> Stage:
    """A stage that writes the prompts of a turn.

    Args:
        name: of the stage.
        turn: 1 or 2.
        base: where the tokenizer of the policy is.
        settings: where the questions are.
        before: the answers to the first turn.
    """
    assert settings.path
    identity = {"questions": sources.identity([str(_file(settings.path, "question.jsonl"))], None, ""), "limit": settings.limit}
    return Stage(name, identity | {"turn": turn}, {"base": base} | ({"before": before} if before else {}), version=2)


def _file(path: str, name: str) -> Path:
    file = Path(path).expanduser() / name
    if not file.is_file():
        raise StageError(f"mt_bench.path={path!r} has no file {name}")
    return file


def _references(path: str) -> list[Path]:
    return sorted(Path(path).expanduser().glob("reference_answer_*.jsonl"))


def write_turn(settings: MtBench, trust_remote_code: bool) -> Work:
    """Returns the work of the stage."""

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        import ray

        (stage,) = stages
        before: dict[str, tuple[Any, str]] = {}
        if "before" in stage.inputs:
            for path in shards(run.directory(stage.inputs["before"]) / "train"):
                for row in pq.read_table(path, columns=["id", "prompt", "response"]).to_pylist():
                    before[row["id"]] = row["prompt"], row["response"]
        rows = []
        for question in read(settings):
            asked = {"role": "user", "content": question["turns"][stage.settings["turn"] - 1]}
            prompt, answer = before.get(question["id"], ([], ""))
            rows.append((question["id"], [*prompt, {"role": "assistant", "content": answer}, asked] if prompt else [asked]))
        tokenizer = base_model.tokenizer(run, stage.inputs["base"])
        # In a worker: the driver loads no tokenizer.
        run.keeper.make_room(Need(1, cpus=1))
        made = ray.get(ray.remote(_tokenized).remote(rows, tokenizer, trust_remote_code))
        (run.directory(stage) / "train").mkdir(exist_ok=True)
        write_rows(run.directory(stage) / "train" / "00000.parquet", made, DEMONSTRATION)
        return {stage.name: {"rows": len(made), "longest": max(len(row["prompt_ids"]) for row in made)}}

    return work


def _tokenized(rows: list[tuple[str, list[dict[str, str]]]], tokenizer: str, trust_remote_code: bool) -> list[dict[str, Any]]:
    chat = Chat(tokenizer, trust_remote_code)
    return [
        {"id": key, "source": "question.jsonl", "prompt": prompt, "response": "", "prompt_ids": chat.prompt_ids(prompt), "response_ids": []}
        for key, prompt in rows
    ]


def read(settings: MtBench) -> list[dict[str, Any]]:
    """The questions: `id`, `category`, `turns` and, where one is published, the `references` of both turns.

    Raises:
        StageError: a file is missing or a line cannot be read.
    """
    assert settings.path
    references: dict[str, list[str]] = {}
    for file in _references(settings.path):
        for row in _lines(file, lambda row: {"id": str(row["question_id"]), "turns": row["choices"][0]["turns"]}):
            references[row["id"]] = row["turns"]
    file = _file(settings.path, "question.jsonl")
    rows = _lines(
        file, lambda row: {"id": str(row["question_id"]), "category": row["category"], "turns": [row["turns"][0], row["turns"][1]]}
    )
    if not rows:
        raise StageError(f"{file} holds no question")
    # The file has its questions by category.
    return [row | {"references": references.get(row["id"], [])} for row in spread(rows, settings.limit or len(rows))]


def _lines(file: Path, reader: Any) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(reader(json.loads(line)))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise StageError(f"{file}:{number}: not a line of MT-Bench: {type(error).__name__} {error}") from None
    return rows


def plan_questions(samples: Mapping[str, tuple[Stage, ...]], settings: MtBench, judge: JudgeModel) -> Stage:
    """The stage that writes what the judge is asked.

    Args:
        samples: of each policy, of both turns.
        settings: where the questions are.
        judge: its templates.
    """
    text = prompts.template("mt_bench", True, Path(judge.templates) if judge.templates else None)
    if "response" not in prompts.places(text):
        raise StageError("the template mt_bench.grade.txt lacks {response}: the judge would not see it")
    inputs = {f"{name}-{turn}": stage for name, stages in samples.items() for turn, stage in zip(TURNS, stages, strict=True)}
    assert settings.path
    known = {"references": sources.identity([str(file) for file in _references(settings.path)], None, "")}
    written = {"template": text, "ending": prompts.ENDINGS["grade"]}
    return Stage("evaluation/mt_bench/questions", written | known, inputs, demand="the driver")


def write_questions(settings: MtBench, names: list[str]) -> Work:
    """Returns the work of the stage: QUESTION rows for each policy and turn."""

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        (stage,) = stages
        questions = {row["id"]: row for row in read(settings)}
        rows = []
        known = [file.name for file in _references(str(settings.path))]
        if len(known) > 1:
            log.warning("mt_bench.path=%r has %s: where several answer a question, the last is shown to the judge", settings.path, known)
        if not known:
            log.warning("mt_bench.path=%r has no reference_answer_*.jsonl: mathematics is graded with nothing beside it", settings.path)
        for name in names:
            for turn in TURNS:
                for path in shards(run.directory(stage.inputs[f"{name}-{turn}"]) / "train"):
                    for row in pq.read_table(path, columns=["id", "prompt", "response"]).to_pylist():
                        references = questions[row["id"]]["references"]
                        reference = references[turn - 1] if len(references) >= turn else ""
                        text = prompts.fill(stage.settings["template"], row["prompt"], [row["response"]], "grade", reference)
                        asked = {"id": row["id"], "first": name, "second": None, "part": turn, "kind": "grade", "question": text}
                        rows.append(asked)
        write_rows(run.directory(stage) / "00000.parquet", rows, QUESTION)
        return {stage.name: {"questions": len(rows)}}

    return work


def plan_grades(answers: Stage) -> Stage:
    """The stage that reads the grades."""
    return Stage("evaluation/mt_bench/grades", {}, {"answers": answers}, demand="the driver", version=3)


def read_grades(settings: MtBench, judge: Judge) -> Work:
    """Returns the work of the stage: GRADE rows, and the means.

    Raises (the work):
        StageError: too many grades cannot be read.
    """

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        (stage,) = stages
        categories = {row["id"]: row["category"] for row in read(settings)}
        rows = []
        for path in shards(run.directory(stage.inputs["answers"])):
            for row in pq.read_table(path).to_pylist():
                grade = None if row["failed"] else read_grade(row["text"], row["cut"])
                named = {"id": row["id"], "policy": row["first"], "category": categories[row["id"]], "turn": row["part"], "grade": grade}
                rows.append(named | {"question": row["question"], "answer": row["text"], "failed": row["failed"]})
        write_rows(run.directory(stage) / "grades.parquet", rows, GRADE)
        answered = [row for row in rows if not row["failed"]]
        check_read(stage, [row["answer"] for row in answered if row["grade"] is None], len(answered), judge)
        return {stage.name: numbers(rows)}

    return work


def numbers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each policy the mean grade with its standard error over questions, of each turn and of each category, and what was not read."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == name]
        read = [row for row in own if row["grade"] is not None]
        by_question: dict[str, list[float]] = {}
        for row in read:
            by_question.setdefault(row["id"], []).append(row["grade"])
        # The two turns of a question are not independent.
        mean, error = mean_and_error([statistics.fmean(grades) for grades in by_question.values()])
        groups = {f"turn {turn}": [row["grade"] for row in read if row["turn"] == turn] for turn in TURNS}
        groups |= {kind: [row["grade"] for row in read if row["category"] == kind] for kind in dict.fromkeys(r["category"] for r in own)}
        parts = {group: statistics.fmean(grades) if grades else None for group, grades in groups.items()}
        failed = sum(bool(row["failed"]) for row in own)
        found[name] = {"grade": mean, "stderr": error, "parts": parts, "n": len(read), "questions": len({row["id"] for row in own})}
        found[name]["failed"] = failed
        found[name]["unparsed"] = len(own) - len(read) - failed
    return found


def tables(found: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Tables for a person, by title; the header first."""
    groups = list(next(iter(found.values()))["parts"]) if found else []
    rows = [["policy", "grade", "±", *groups, "n", "unread", "no answer"]]
    for name, row in found.items():
        parts = ["" if row["parts"][group] is None else f"{row['parts'][group]:.2f}" for group in groups]
        mean = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("grade", "stderr")]
        rows.append([name, *mean, *parts, *(str(row[key]) for key in ("n", "unparsed", "failed"))])
    return {"MT-Bench, grades from 1 to 10": rows}


def doubts(found: Mapping[str, Any]) -> list[str]:
    """Warns of grades that are missing from a mean, and of a mean over few questions."""
    told = []
    fewest = min((row.get("questions", QUESTIONS) for row in found.values()), default=QUESTIONS)
    if fewest < QUESTIONS:
        kinds = ", ".join(group for group in next(iter(found.values()))["parts"] if not group.startswith("turn "))
        told.append(f"MT-Bench: {fewest} of its {QUESTIONS} questions ({kinds}): the mean is not that of MT-Bench")
    for name, row in found.items():
        rest = f"not in its mean over {row['n']}"
        if row["failed"]:
            told.append(f"MT-Bench: {row['failed']} questions about {name} were not answered by the judge: {rest}")
        if row["unparsed"]:
            told.append(f"MT-Bench: {row['unparsed']} answers of the judge about {name} could not be read: {rest}")
    return told
