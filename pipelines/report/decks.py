"""Decks of cards: what was asked, and beside each other what everybody said to it.

stages that are done, rows on disk --> title --> cards
"""

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipelines.records import shards, spread
from pipelines.report.facts import EVALUATED, Facts
from pipelines.watching.states import StageFacts

CARDS = 10
"""of a deck at most"""
CUT = "cut"
"""Mark of a response that ended at the limit of tokens."""
BEST = "best_of_n/results"
GAMES, GRADES = "evaluation/tournament/games", "evaluation/mt_bench/grades"
OUTCOMES = {"first": ("won", "lost"), "second": ("lost", "won"), "failed": ("no answer",) * 2, "unparsed": ("unread",) * 2}
ORDERS = (("answer", "given", ("first", "second")), ("answer_swapped", "swapped", ("second", "first")))
"""Columns of what a judge said and of what was read of it, and the order in which it was shown the responses."""
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Side:
    """What somebody said, and what was made of it ("right", "won", a number, "cut")."""

    name: str
    text: str
    mark: str = ""


@dataclass(frozen=True)
class Card:
    """A prompt and what was said to it."""

    prompt: str
    sides: tuple[Side, ...]


def decks(facts: Facts) -> dict[str, list[Card]]:
    """Held-out prompts (of an evaluation its prompts), spread over all, with the answers of every policy; the best of N beside the greedy
    response; games and grades with the judge's words; rows of tasks. Without those of which there are none."""
    root, done = facts.root, facts.done
    asked = next((root / stage.name / "train" for stage in done if stage.name.startswith(EVALUATED) and stage.own == "prompts"), None)
    prompts = asked or root / "demonstrations" / "held_out"
    found = {"Answers": _answers(root, done, prompts, evaluated=asked is not None)}
    names = {stage.name for stage in done}
    found["The best of N"] = _choices(root, names) if BEST in names else []
    found["Games before the judge"] = [card for file in shards(root / GAMES) if GAMES in names for card in _games(file, prompts)]
    found["Grades of MT-Bench"] = [card for file in shards(root / GRADES) if GRADES in names for card in _grades(file)]
    tasks: dict[str, dict[str, Path]] = {}
    for stage in done:
        if stage.name.startswith(EVALUATED) and stage.own.startswith("tasks/"):
            tasks.setdefault(stage.own.removeprefix("tasks/"), {})[stage.policy] = root / stage.name
    found |= {f"Task {name}": _task(folders) for name, folders in tasks.items()}
    return {title: cards for title, cards in found.items() if cards}


def _answers(root: Path, done: Sequence[StageFacts], prompts: Path, evaluated: bool) -> list[Card]:
    # Files are sorted by topic or difficulty more often than not.
    chosen = set(spread([key for path in shards(prompts) for key in pq.read_table(path, columns=["id"])["id"].to_pylist()], CARDS))
    real: dict[str, dict[str, Any]] = {}
    for path in shards(prompts):
        rows = pq.read_table(path, columns=["id", "prompt", "response"], filters=[("id", "in", chosen)])
        real |= {row["id"]: row for row in rows.to_pylist()}
    answers: dict[str, dict[str, tuple[str, float | None, bool]]] = {key: {} for key in real}
    # Of another command in the same directory there may be scores of other answers.
    own_stages = {stage.name for stage in done}
    for stage in done:
        # Of N samples the best are told, not the first.
        if stage.own not in ("samples", "answers") or stage.policy == "best_of_n" or stage.name.startswith(EVALUATED) != evaluated:
            continue
        scored = f"{stage.name.rpartition('/')[0]}/{'score-1' if evaluated else 'evaluation'}"
        scores = _scores(root / scored / ("train" if evaluated else "")) if scored in own_stages else {}
        for path in shards(root / stage.name / ("train" if evaluated else "held_out")):
            wanted = [("id", "in", list(real)), ("sample", "=", 0)]
            for row in pq.read_table(path, columns=["id", "response", "finish_reason"], filters=wanted).to_pylist():
                answers[row["id"]][stage.policy] = row["response"], scores.get(row["id"]), row["finish_reason"] == "length"
    mark = _marks(score for said in answers.values() for _, score, _ in said.values())
    cards = []
    for key, row in real.items():
        sides = [Side(name, text, ", ".join(filter(None, (mark(score), cut * CUT)))) for name, (text, score, cut) in answers[key].items()]
        cards += [Card(_conversation(row["prompt"]), (Side("demonstration", row["response"]), *sides))] if sides else []
    return cards


def _choices(root: Path, done: Collection[str]) -> list[Card]:
    """The response that was chosen of each of the first held-out prompts, beside the greedy one, with what the judge gives them."""
    if not (file := root / BEST / "chosen.held_out.jsonl").exists():
        return []
    with file.open(encoding="utf-8") as lines:
        chosen = [json.loads(line) for line in itertools.islice(lines, CARDS)]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in shards(root / BEST / "samples" / "held_out"):
        if all((json.dumps(line["input"]), line["output"]) in rows for line in chosen):
            break
        names = [name for name in ("id", "prompt", "response", "golden") if name in pq.read_schema(path).names]
        some = pq.read_table(path, columns=names, filters=[("response", "in", [line["output"] for line in chosen])])
        rows |= {(json.dumps(row["prompt"]), row["response"]): row for row in some.to_pylist()}
    picked = [(line, rows[json.dumps(line["input"]), line["output"]]) for line in chosen]
    ids = [row["id"] for _, row in picked]
    real = _responses(root / "demonstrations", ids)
    # Of another command in the same directory there may be others.
    greedy = _responses(root / "best_of_n/greedy", ids) if "best_of_n/greedy" in done else {}
    judged = _scores(root / "best_of_n/golden-greedy/held_out") if "best_of_n/golden-greedy" in done else {}
    mark = _marks([*(row.get("golden") for _, row in picked), *(judged.get(key) for key in ids)])
    cards = []
    for line, row in picked:
        sides = [Side("demonstration", real[row["id"]])]
        if row["id"] in greedy:
            sides.append(Side("greedy", greedy[row["id"]], mark(judged.get(row["id"]))))
        said = ", ".join(filter(None, (mark(row.get("golden")), f"reward {line['reward']:.3g}")))
        cards.append(Card(_conversation(row["prompt"]), (*sides, Side("the best of N", line["output"], said))))
    return cards


def _responses(stage: Path, ids: Sequence[str]) -> dict[str, str]:
    tables = [pq.read_table(path, columns=["id", "response"], filters=[("id", "in", ids)]) for path in shards(stage / "held_out") if ids]
    return {row["id"]: row["response"] for table in tables for row in table.to_pylist()}


def _games(file: Path, prompts: Path) -> list[Card]:
    """Of every pair as many, one at least."""
    pairs: dict[tuple[str, str], list[int]] = {}
    for number, game in enumerate(pq.read_table(file, columns=["first", "second"]).to_pylist()):
        pairs.setdefault((game["first"], game["second"]), []).append(number)
    shown = [number for numbers in pairs.values() for number in spread(numbers, max(1, CARDS // len(pairs)))]
    games = pq.read_table(file).take(shown).to_pylist() if shown else []
    asked: dict[str, str] = {}
    for path in shards(prompts):
        rows = pq.read_table(path, columns=["id", "prompt"], filters=[("id", "in", [game["id"] for game in games])])
        asked |= {row["id"]: _conversation(row["prompt"]) for row in rows.to_pylist()}
    return [_game(game, asked.get(game["id"], game["id"])) for game in games]


def _game(game: Mapping[str, Any], prompt: str) -> Card:
    marks = OUTCOMES.get(game["outcome"], (game["outcome"],) * 2)
    said = [Side(game[name], game[f"response_{name}"], mark) for name, mark in zip(("first", "second"), marks, strict=True)]
    if game["question"] is None:
        return Card(prompt, (*said, Side("the judge", "was not asked: both are the same")))
    names = {name: game[name] for name in ("first", "second")}
    for answer, reading, order in ORDERS:
        shown = " before ".join(names[name] for name in order)
        # Of a game that failed, neither order is read.
        read = f"for {names[game[reading]]}" if game[reading] in names else game[reading] or ""
        said.append(Side(f"the judge, shown {shown}", game[answer] or "", "no answer" if game[answer] is None else read))
    return Card(prompt, tuple(said))


def _grades(file: Path) -> list[Card]:
    """Of some questions, spread over the categories, both turns of every policy. What the judge was shown holds question and answer."""
    questions: dict[str, Rows] = {}
    for row in pq.read_table(file).to_pylist():
        questions.setdefault(row["id"], []).append(row)
    count = max(1, CARDS // max(map(len, questions.values()), default=1))
    return [_grade(row) for key in spread(list(questions), count) for row in sorted(questions[key], key=lambda row: row["turn"])]


def _grade(row: Mapping[str, Any]) -> Card:
    grade = "no answer" if row["failed"] else "unread" if row["grade"] is None else f"{row['grade']:g}"
    return Card(row["question"], (Side(f"the judge on {row['policy']}, turn {row['turn']}", row["answer"] or "", grade),))


def _task(folders: Mapping[str, Path]) -> list[Card]:
    """Of each task of a group as many, one at least."""
    rows: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for policy, folder in folders.items():
        files = shards(folder)
        each = max(1, CARDS // max(1, len(files)))
        rows[policy] = {(path.stem, row["row"]): row for path in files for row in _head(path, each)}
    mark = _marks(row["score"] for own in rows.values() for row in own.values())
    cards = []
    for key in dict.fromkeys(key for own in rows.values() for key in own):
        found = {policy: own[key] for policy, own in rows.items() if key in own}
        example = next(iter(found.values()))
        several = len(example["prompts"]) > 1
        asked = "\n\n".join(f"({k}) {text}" if several else text for k, text in enumerate(example["prompts"], start=1))
        sides = [Side(policy, _said(row, several), mark(row["score"])) for policy, row in found.items()]
        cards.append(Card(f"{key[0]}\n\n{asked}", (Side("the right answer", example["target"]), *sides)))
    return cards


def _said(row: Mapping[str, Any], several: bool) -> str:
    """What a policy wrote, or how probable it found each choice; `several` prompts, one a choice, are told apart by their numbers."""
    if not row["continuations"]:
        return "\n\n".join([*row["responses"], *(f"program: {verdict}" for verdict in row["verdicts"])])
    choices = enumerate(zip(row["loglikelihoods"], row["continuations"], strict=True), start=1)
    lines = [f"{value:8.2f} {f'({k}) ' if several else ''}{choice.strip()}" for k, (value, choice) in choices]
    return "\n".join(["log-prob of each choice, in all:", *lines])


def _marks(scores: Iterable[float | None]) -> Callable[[float | None], str]:
    """How to write scores: of those that say yes or no in words, any other as its number."""
    binary = set(scores) <= {None, 0.0, 1.0}

    def mark(score: float | None) -> str:
        return "" if score is None else ("right" if score else "wrong") if binary else f"{score:.4g}"

    return mark


def _head(path: Path, count: int, columns: list[str] | None = None) -> Rows:
    """The first rows; no more of a large file is read."""
    with pq.ParquetFile(path) as file:
        return next((batch.to_pylist() for batch in file.iter_batches(count, columns=columns)), [])


def _scores(folder: Path) -> dict[str, float]:
    """Of the first answer to each prompt; those of a training's evaluation are of the only one."""
    rows = [row for path in shards(folder) for row in pq.read_table(path).to_pylist()]
    return {row["id"]: row["score"] for row in rows if row.get("sample", 0) == 0}


def _conversation(messages: Sequence[Mapping[str, str]]) -> str:
    """Of a single question the words alone."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
