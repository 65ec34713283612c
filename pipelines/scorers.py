"""Scorers of responses: (rows, demonstrations' file, tell) -> a score for each row, or none and why.

Rows have `id, prompt, prompt_ids, response, response_ids` and, of samples, `finish_reason`.
"""

import asyncio
import importlib
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow.parquet as pq

from actors.prefixes import common_to_all
from actors.settings import RewardScoring
from pipelines.chat import Chat
from pipelines.client import AsyncClient, ServiceError
from pipelines.evaluation import exact_answer
from pipelines.run.artifacts import StageError

Row = dict[str, Any]
Scored = tuple[float | None, str | None]
"""A score, or None and why there is none."""
Tell = Callable[[int], None]
"""Called with the number of responses that are scored, as it grows."""


def function(scorer: str, folder: str) -> Callable[[list[dict[str, str]], str], float]:
    """Imports a Python scorer, (messages, response) -> float.

    Args:
        scorer: "module:function".
        folder: searched first.

    Raises:
        StageError: the module cannot be imported, or has no such function.
    """
    module, _, name = scorer.partition(":")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # noqa: BLE001
        # A module of somebody else's may fail in ways of its own.
        raise StageError(f"scorer {scorer!r}: the module {module!r} cannot be imported from {folder}: {error}") from None
    if not callable(found):
        raise StageError(f"scorer {scorer!r}: the module {module!r} has no function {name!r}")
    return found


def exact_answers(rows: Sequence[Row], demonstrations: str, tell: Tell) -> list[Scored]:
    """1 where the final number is that of the demonstration, else 0."""
    gold = {row["id"]: row["response"] for row in pq.read_table(demonstrations, columns=["id", "response"]).to_pylist()}
    right = (exact_answer(row["response"], gold[row["id"]]) for row in rows)
    return [(None, "the demonstration has no number after '####'") if r is None else (float(r), None) for r in right]


def by_pattern(pattern: str, rows: Sequence[Row], demonstrations: str, tell: Tell) -> list[Scored]:
    """1 where what a regular expression finds last in the response is what it finds last in the demonstration, else 0."""
    expression = re.compile(pattern)
    gold = {row["id"]: found(expression, row["response"]) for row in pq.read_table(demonstrations, columns=["id", "response"]).to_pylist()}
    nothing = f"the demonstration holds nothing that {pattern!r} finds"
    return [
        (None, nothing) if gold[row["id"]] is None else (float(found(expression, row["response"]) == gold[row["id"]]), None) for row in rows
    ]


def found(expression: re.Pattern[str], text: str) -> str | None:
    """The first group (without one, all) of the last place that an expression finds in a text, without white space around it."""
    places = list(expression.finditer(text))
    return (places[-1].group(1 if expression.groups else 0) or "").strip() if places else None


def by_function(scorer: Callable[[list[dict[str, str]], str], float], rows: Sequence[Row], demonstrations: str, tell: Tell) -> list[Scored]:
    """A person's function of (messages, response)."""
    results: list[Scored] = []
    for row in rows:
        tell(len(results))
        try:
            results.append(finite(float(scorer(row["prompt"], row["response"]))))
        except Exception as error:  # noqa: BLE001
            # Whatever it raises is about this response.
            results.append((None, f"the scorer raised {type(error).__name__}: {error}"))
    return results


def by_url(url: str, rows: Sequence[Row], demonstrations: str, tell: Tell) -> list[Scored]:
    """A reward model that is served (`jobs/serve_bon.py`). A key is taken from the environment variable GSIL_API_KEY.

    Raises:
        StageError: the service does not answer, or refuses everybody.
    """
    return asyncio.run(_ask(url, rows, tell))


async def _ask(url: str, rows: Sequence[Row], tell: Tell) -> list[Scored]:
    client = AsyncClient(url, api_key=os.environ.get("GSIL_API_KEY"))
    scored = 0

    async def one(row: Row) -> Scored:
        nonlocal scored
        said = {"role": "assistant", "content": row["response"]}
        try:
            (value,) = await client.rewards([[*row["prompt"], said]], cut=row.get("finish_reason") == "length")
            result = finite(value)
        except ServiceError as error:
            if error.status not in (400, 413, 422):
                raise StageError(f"scorer {url}: {error}") from None
            result = None, str(error)
        tell(scored := scored + 1)
        return result

    try:
        return list(await asyncio.gather(*(one(row) for row in rows)))
    finally:
        await client.close()


def finite(value: float) -> Scored:
    """A score, unless it is not a finite number."""
    return (value, None) if math.isfinite(value) else (None, f"the score is {value}")


class ByModel:
    """A reward model.

    Args:
        weights: its directory or hub id.
        ours: trained by this run, on the run's token ids; else the text is written in the model's own chat template, or a plain one.
        scoring: the pool, for threads, device and tokens a batch.
        precision: of the forward pass.
        longest: no prompt with one of its responses is longer, in the run's tokens.
        trust_remote_code: run Python code that comes with the model.
    """

    def __init__(self, weights: str, ours: bool, scoring: RewardScoring, precision: str, longest: int, trust_remote_code: bool):
        from actors.reward import engine as reward_engine

        # In another tokenizer's tokens a conversation has another length; an engine needs room for one of the longest.
        room = longest if ours else max(2 * longest, 8192)
        self.model, self.context = reward_engine.load(weights, scoring, precision, room, trust_remote_code)
        self.chat = None if ours else Chat(weights, trust_remote_code)
        self.untemplated = bool(self.chat and self.chat.plain)
        self.retemplated = False

    def __call__(self, rows: Sequence[Row], demonstrations: str, tell: Tell) -> list[Scored]:
        """Scores rows; equal responses to a prompt once."""
        from actors.learner.batches import Example

        results: list[Scored] = [(None, "")] * len(rows)
        examples: list[Example] = []
        places: list[list[list[int]]] = []
        for key, group in itertools.groupby(range(len(rows)), lambda number: rows[number]["id"]):
            same: dict[tuple[int, ...], list[int]] = {}
            for number in group:
                try:
                    ids = self._ids(rows[number])
                except Exception as error:  # noqa: BLE001
                    # Chat templates are programs of others.
                    results[number] = None, f"the reward model's chat template refuses the conversation: {error}"
                    continue
                if len(ids) > self.context:
                    results[number] = None, f"{len(ids)} tokens, the context of the reward model is {self.context}"
                    continue
                same.setdefault(ids, []).append(number)
            if same:
                # A response has at least a token of its own.
                shared = common_to_all(ids[:-1] for ids in same)
                examples.append(Example(key, next(iter(same))[:shared], tuple(ids[shared:] for ids in same)))
                places.append(list(same.values()))
        for values, groups in zip(self.model(examples, tell), places, strict=True):
            for value, numbers in zip(values, groups, strict=True):
                for number in numbers:
                    results[number] = finite(value)
        return results

    def _ids(self, row: Row) -> tuple[int, ...]:
        """Prompt and response, in the words of the model."""
        if self.chat is None:
            return (*row["prompt_ids"], *row["response_ids"])
        # A response that was cut did not end its turn.
        ids = self.chat.conversation_ids(row["prompt"], row["response"], ended=row.get("finish_reason") != "length")
        self.retemplated |= ids != [*row["prompt_ids"], *row["response_ids"]]
        return tuple(ids)
