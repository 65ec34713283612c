"""A judge's answers to questions on disk, whoever the judge is: a model here or an endpoint.

    evaluation/tournament/questions (QUESTION) --> cache? --> endpoint, or vLLM actors --> evaluation/tournament/answers (ANSWER)

The same question is asked once, in this run and in all that share its cache. What was answered stays, whatever stops the job.
"""

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.generator import environment
from actors.judge.engine import JudgeEngine, Words
from pipelines import base_model
from pipelines.chat import Chat
from pipelines.judges.answers import Cache
from pipelines.judges.asking import LABELS, Asking, cost
from pipelines.judges.endpoint import Spent
from pipelines.judges.settings import Judge
from pipelines.records import shards, write_rows
from pipelines.run.artifacts import Run, Stage, StageError
from pipelines.workers.shards import Shard, map_shards

log = logging.getLogger(__name__)

QUESTIONS_A_FILE = 512
QUESTION = pa.schema(
    {"id": pa.string(), "first": pa.string(), "second": pa.string(), "part": pa.int32(), "kind": pa.string(), "question": pa.string()}
)
"""`part` tells the questions on one prompt apart: the order of the two responses, or the turn. `kind` is "text", "logprob" or "grade"."""
SAID = [
    *(("text", pa.string()), ("logps", pa.list_(pa.float64())), ("cut", pa.bool_())),
    *(("read", pa.int64()), ("written", pa.int64()), ("failed", pa.string())),
]
ANSWER = pa.schema([*QUESTION, *SAID])
"""`cut`: the answer ends before the judge had ended. Of a question without an answer, `failed` says why."""

Row = dict[str, Any]


def plan(name: str, questions: Stage, judge: Judge, model: Stage | None) -> Stage:
    """The stage that asks.

    Args:
        name: of the stage.
        questions: whose questions.
        judge: who is asked.
        model: the stage of its weights, where it judges here.
    """
    inputs = {"questions": questions} | ({"model": model} if model else {})
    # More room answers questions that were too long before; what was answered stays in the cache.
    room = {"max_model_len": judge.max_model_len} if model else {}
    return Stage(name, _identity(judge) | room, inputs, demand="the driver" if judge.url else judge.demand(), version=2)


def _identity(judge: Judge) -> dict[str, Any]:
    """Who answers, and how long; what is asked is in the questions."""
    return {"url": judge.url, "url_model": judge.url_model, "max_new_tokens": judge.max_new_tokens, "dtype": judge.dtype}


def ask(judge: Judge, trust_remote_code: bool) -> Any:
    """Returns the work of the stages, which share the judge's limits.

    Raises (the work):
        StageError: too many questions got no answer, or a limit was reached.
    """
    spent = Spent()

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        return {stage.name: _answer(run, stage, judge, spent, trust_remote_code) for stage in stages}

    return work


def _answer(run: Run, stage: Stage, judge: Judge, spent: Spent, trust_remote_code: bool) -> dict[str, Any]:
    rows = [row for path in shards(run.directory(stage.inputs["questions"])) for row in pq.read_table(path).to_pylist()]
    who = [_identity(judge), stage.inputs["model"].fingerprint if "model" in stage.inputs else None]
    cache = Cache(Path(judge.cache) if judge.cache else run.root / "judge_answers.jsonl")
    keys = [cache.key(who, row) for row in rows]
    known = len(cache.answers.keys() & set(keys))
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in cache.answers}
    failed: dict[str, str] = {}
    before = replace(spent)
    run.display.follow(len(set(keys)), "answers", lambda: min(len(set(keys)), known + cache.taken))
    try:
        if judge.url:
            failed = asyncio.run(Asking(judge, cache, spent).all(missing, most=judge.max_failed_fraction * len(set(keys))))
        elif missing:
            failed = _ask_here(run, stage, judge, cache, missing, trust_remote_code)
    finally:
        cache.close()
    silence: Row = {"text": None, "logps": None, "cut": None, "read": 0, "written": 0}
    silent = sum(key not in cache.answers for key in set(keys)) - len(failed)
    _check(stage, failed, len(set(keys)), f" ({silent} more were then not asked)" if silent else "", judge)
    answers = [row | {"failed": failed.get(key)} | cache.answers.get(key, silence) for key, row in zip(keys, rows, strict=True)]
    write_rows(run.directory(stage) / "00000.parquet", answers, ANSWER)
    told = {"questions": len(rows), "asked": len(missing), "cached": known, "failed": len(failed)}
    if judge.url:
        read, written = spent.read - before.read, spent.written - before.written
    else:
        new = [cache.answers[key] for key in missing if key in cache.answers]
        read, written = (sum(answer[side] for answer in new) for side in ("read", "written"))
    reasons = dict(Counter(failed.values()).most_common(5))
    return told | {"read": read, "written": written, "cost": cost(judge, read, written), "reasons": reasons}


def check_read(stage: Stage, unread: Sequence[str | None], verdicts: int, judge: Judge) -> None:
    """Stops where a judge says too little that can be read.

    Args:
        stage: that reads.
        unread: answers that say nothing.
        verdicts: all that it gave.
        judge: its limit.

    Raises:
        StageError: they are too many.
    """
    if len(unread) > judge.max_unread_fraction * verdicts:
        raise StageError(
            f"{stage.name}: {len(unread)} of {verdicts} verdicts of the judge cannot be read, more than judge.max_unread_fraction="
            f"{judge.max_unread_fraction}. One says: {(unread[0] or '')[:200]!r}. All answers are kept; another judge, more room "
            "(judge.max_new_tokens), a template of yours (judge.templates) or judge.mode=logprob may mend it"
        )


def _check(stage: Stage, failed: dict[str, str], asked: int, rest: str, judge: Judge) -> None:
    if failed:
        why = next(iter(failed.values()))
        log.warning("%s: %d of %d questions got no answer%s, for example: %s", stage.name, len(failed), asked, rest, why)
    if len(failed) > judge.max_failed_fraction * asked:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in Counter(failed.values()).most_common(3))
        raise StageError(
            f"{stage.name}: {len(failed)} of {asked} questions got no answer{rest}, more than judge.max_failed_fraction="
            f"{judge.max_failed_fraction}: {reasons}. The other answers are kept: "
            + ("run the job again when the judge is well" if judge.url else "run the job again when that is mended")
        )


def _ask_here(run: Run, stage: Stage, judge: Judge, cache: Cache, missing: dict[str, Row], trust_remote_code: bool) -> dict[str, str]:
    """Asks a model of this machine: the questions in files, each answered by an actor; returns why, for those without an answer."""
    folder = run.directory(stage) / "asked"
    folder.mkdir(exist_ok=True)
    tasks = []
    for number, part in enumerate(_parts(list(missing.items()), QUESTIONS_A_FILE)):
        asked = [{"id": key, "kind": row["kind"], "question": row["question"]} for key, row in part]
        # Named by their content: a job that goes on after it was stopped may have other questions left, or more room for them.
        name = hashlib.sha256("".join([str(judge.max_model_len), *(key for key, _ in part)]).encode()).hexdigest()[:16]
        source, output = folder / f"{name}.questions", folder / f"{name}.parquet"
        write_rows(source, asked, pa.schema([QUESTION.field(field) for field in ("id", "kind", "question")]))
        tasks.append(Shard(stage, (str(source),), output, {"number": number, "max_new_tokens": judge.max_new_tokens}, len(part)))
    model = stage.inputs["model"]
    arguments = {
        "weights": base_model.weights(run, model),
        "tokenizer": base_model.tokenizer(run, model),
        "engine": judge,
        "max_model_len": judge.max_model_len,
        "trust_remote_code": trust_remote_code,
    }
    map_shards(run, tasks, JudgeShards, arguments, judge, environment(judge))
    failed = {}
    for task in tasks:
        for row in pq.read_table(task.output).to_pylist():
            key, why = row.pop("id"), row.pop("failed")
            if why:
                failed[key] = why
            else:
                cache.take(key, row)
    return failed


def _parts(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))


class JudgeShards:
    """The actor: a judge in an engine, and the files around it."""

    def __init__(self, tokenizer: str, **arguments: Any):
        self.chat = Chat(tokenizer, arguments["trust_remote_code"])
        self.room = arguments["max_model_len"]
        self.engine = JudgeEngine(tokenizer=tokenizer, **arguments, stop_ids=self.chat.stop_ids)

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        """Answers one file of questions.

        INPUT  id, kind, question
        OUTPUT id and what ANSWER adds to a question
        """
        rows = pq.read_table(inputs[0]).to_pylist()
        ids = [self.chat.prompt_ids([{"role": "user", "content": row["question"]}]) for row in rows]
        # A stage asks for one kind of answer.
        labels = self._labels() if rows[0]["kind"] == "logprob" else []
        room = self.room - (1 if labels else options["max_new_tokens"])
        fitting = [k for k in range(len(rows)) if len(ids[k]) <= room]
        said = dict(zip(fitting, self.engine([ids[k] for k in fitting], options["max_new_tokens"], labels, tell), strict=True))
        answers = []
        for k, row in enumerate(rows):
            words = said.get(k, Words("", 0))
            answer = {"id": row["id"], "text": words.text, "logps": words.logps, "cut": words.cut}
            long = f"the question has {len(ids[k])} tokens, the judge takes {room} (judge.max_model_len)"
            answers.append(answer | {"read": len(ids[k]), "written": words.tokens, "failed": None if k in said else long})
        write_rows(Path(output), answers, pa.schema([("id", pa.string()), *SAID]))

    def _labels(self) -> list[int]:
        """Their first tokens."""
        firsts = [self.chat.tokenizer(label, add_special_tokens=False).input_ids[0] for label in LABELS]
        if len(set(firsts)) < len(firsts):
            raise ValueError(f"the labels {' and '.join(LABELS)} start with the same token of this judge: set judge.mode text")
        return firsts
