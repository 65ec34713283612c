"""A judge's answers to questions on disk, whoever the judge is: a model here or an endpoint.

    evaluation/tournament/questions (QUESTION) --> cache? --> endpoint, or vLLM actors --> evaluation/tournament/answers (ANSWER)

The same question is asked once, in this run and in all that share its cache. What was answered stays, whatever stops the job.
"""

import asyncio
import hashlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.generator import environment
from actors.judge.engine import JudgeEngine, Words
from pipelines import base_model
from pipelines.chat import Chat
from pipelines.judges.answers import Cache
from pipelines.judges.endpoint import Endpoint, EndpointError, Said, Spent
from pipelines.judges.settings import Judge
from pipelines.records import shards, write_rows
from pipelines.run.artifacts import Run, Stage, StageError
from pipelines.workers.shards import Shard, map_shards

log = logging.getLogger(__name__)

LABELS = ("A", "B")
QUESTIONS_A_FILE = 512
FIRST_WAIT = 1.0
"""Seconds before a request that failed is made again; then twice as many, up to a minute."""
LONGEST_WAIT = 600.0
"""Seconds that an endpoint may want to be left alone; one that wants more is asked another time."""
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
    _check(stage, failed, len(set(keys)), judge)
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


def cost(judge: Judge, read: int, written: int) -> float:
    """Price of tokens, in the currency of the prices."""
    return (read * judge.price_in + written * judge.price_out) / 1e6


def _check(stage: Stage, failed: dict[str, str], asked: int, judge: Judge) -> None:
    if failed:
        log.warning("%s: %d of %d questions got no answer, for example: %s", stage.name, len(failed), asked, next(iter(failed.values())))
    if len(failed) > judge.max_failed_fraction * asked:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in Counter(failed.values()).most_common(3))
        raise StageError(
            f"{stage.name}: {len(failed)} of {asked} questions got no answer, more than judge.max_failed_fraction="
            f"{judge.max_failed_fraction}: {reasons}. The other answers are kept: run the job again when the judge is well"
        )


class Stopped(Exception):
    """Nothing more is to be asked, and why."""


class Asking:
    """Asks an endpoint, within the judge's limits.

    Args:
        judge: settings.
        cache: takes the answers.
        spent: in this go of the job, by all who ask; grows.
    """

    def __init__(self, judge: Judge, cache: Cache, spent: Spent):
        self.judge = judge
        self.cache = cache
        self.spent = spent
        # Every attempt counts against the limits: the client makes none of its own.
        self.endpoint = Endpoint(judge, retries=0, timeout=judge.timeout, spent=spent)
        self.next = 0.0
        self.told = 5.0
        """seconds of the longest wait that was said"""
        self.warned = False
        """whether it was said that questions are asked again"""
        self.stopped: str | None = None

    async def all(self, questions: dict[str, Row], most: float) -> dict[str, str]:
        """Asks them until more than `most` have failed; returns why, for those that did.

        Raises:
            StageError: a limit is reached, or the endpoint wants another key.
        """
        failed: dict[str, str] = {}
        waiting = iter(questions.items())

        async def one_after_the_other() -> None:
            while self.stopped is None and len(failed) <= most and (item := next(waiting, None)):
                key, row = item
                try:
                    said = await self._patiently(row)
                except EndpointError as error:
                    failed[key] = str(error)
                except Stopped as why:
                    # Answers under way to the others are paid for, and kept.
                    self.stopped = str(why)
                else:
                    self.cache.take(key, asdict(said))

        try:
            await asyncio.gather(*(one_after_the_other() for _ in range(min(self.judge.concurrency, len(questions)))))
        finally:
            await self.endpoint.close()
        if self.stopped:
            raise StageError(f"{self.stopped}; {self.cache.taken} answers came and are kept: the same command continues")
        return failed

    async def _patiently(self, row: Row) -> Said:
        for attempt in range(self.judge.retries + 1):
            await self._turn()
            try:
                if row["kind"] == "logprob":
                    said = await self.endpoint.label_logps(row["question"], LABELS)
                else:
                    said = await self.endpoint.write(row["question"], self.judge.max_new_tokens)
                    if not said.text.strip():
                        raise EndpointError("the judge's endpoint answers with no word")
            except EndpointError as error:
                if error.denied:
                    raise Stopped(f"{error}: set that variable where the job runs") from None
                if error.hopeless or attempt == self.judge.retries:
                    raise
                if not self.warned:
                    self.warned = True
                    log.warning("%s; it is asked again, up to %d times a question, with growing waits", error, self.judge.retries)
                # Never sooner than the endpoint wants.
                await asyncio.sleep(max(self._wanted(error), min(60.0, FIRST_WAIT * 2.0**attempt)) * random.uniform(1, 1.5))
            else:
                if self.judge.max_cost is not None and not said.read:
                    raise Stopped("judge.max_cost cannot be kept: the judge's endpoint does not say how many tokens it read")
                return said
        raise AssertionError("the last attempt returns or raises")

    def _wanted(self, error: EndpointError) -> float:
        """Seconds that the endpoint wants to be left alone, said where somebody would notice them.

        Raises:
            Stopped: they are too many to wait for.
        """
        seconds = error.retry_after or 0.0
        if seconds > LONGEST_WAIT:
            raise Stopped(f"{error}: it wants to be left alone for {seconds:.0f} s")
        if seconds > 2 * self.told:
            self.told = max(seconds, 10.0)
            log.info("the judge's endpoint wants to be left alone for %.0f s", seconds)
        return seconds

    async def _turn(self) -> None:
        """Waits until a request may be made, and counts it."""
        limit = self.judge.max_requests
        if limit is not None and self.spent.requests >= limit:
            raise Stopped(f"judge.max_requests={limit} requests are made")
        if self.judge.max_cost is not None and cost(self.judge, self.spent.read, self.spent.written) >= self.judge.max_cost:
            raise Stopped(f"judge.max_cost={self.judge.max_cost:g} is spent")
        self.spent.requests += 1
        if self.judge.requests_per_minute:
            now = time.monotonic()
            self.next = max(now, self.next) + 60 / self.judge.requests_per_minute
            await asyncio.sleep(max(0.0, self.next - 60 / self.judge.requests_per_minute - now))


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
