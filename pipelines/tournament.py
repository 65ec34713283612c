"""A tournament: everybody's responses to the same prompts, compared in pairs by a judge, in both orders.

    policies' samples, demonstrations, files of responses --> questions --> judging.py --> games (GAME), rates, ranking

A win needs both orders to agree, disagreement is a tie, an answer that cannot be read is counted apart (METHODS of the AfD paper, arXiv
2405.15624, and of MT-Bench, arXiv 2306.05685). Equal responses are a tie without a question.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.judge import prompts
from actors.judge.ranking import length_controlled, points, position_bias, ranking, shares
from actors.judge.verdicts import Reading, read_pair, read_probabilities, turned, winner
from pipelines.data import sources
from pipelines.judges.settings import Judge, JudgeModel, Tournament
from pipelines.judging import QUESTION, QUESTIONS_A_FILE, check_read
from pipelines.means import FEW, cell
from pipelines.records import shards, write_rows
from pipelines.responses import from_files
from pipelines.run.artifacts import Run, Stage, StageError, Work

DEMONSTRATIONS = "demonstrations"
GAME = pa.schema(
    {
        **{name: pa.string() for name in ("id", "first", "second", "outcome", "given", "swapped")},
        **{name: pa.string() for name in ("response_first", "response_second", "question", "answer", "question_swapped", "answer_swapped")},
    }
)
"""`outcome` is "first", "second", "tie", "unparsed" or "failed" (no answer); `given` and `swapped` are the same of each order alone."""
ORDERS = (("given", "answer"), ("swapped", "answer_swapped"))
"""Columns of what was read of each order, and of what the judge said."""
WORDS: dict[Reading, str] = {0: "first", 1: "second", "tie": "tie", "unparsed": "unparsed"}
READINGS = {word: reading for reading, word in WORDS.items()}


def plan_questions(demonstrations: Stage, samples: Mapping[str, Stage], tournament: Tournament, judge: JudgeModel) -> Stage:
    """The stage that writes what the judge is asked.

    Args:
        demonstrations: the prompts, and a contestant.
        samples: of the policies, by name.
        tournament: settings.
        judge: its mode and templates.

    Raises:
        StageError: a contestant is not there, or a template lacks a response.
    """
    known = [*samples, DEMONSTRATIONS, *tournament.responses]
    if twice := [name for name in tournament.responses if name in (*samples, DEMONSTRATIONS)]:
        raise StageError(f"tournament.responses: {twice[0]!r} is already somebody here: give these responses another name")
    if DEMONSTRATIONS in samples and DEMONSTRATIONS in tournament.contestants:
        raise StageError(f"a policy is called {DEMONSTRATIONS!r}, as the demonstrations themselves are: give it another name")
    for name in tournament.contestants:
        if name not in known:
            raise StageError(f"tournament.contestants: there is no {name!r}; there are {', '.join(known)}")
    text = prompts.template(tournament.criterion, False, Path(judge.templates) if judge.templates else None)
    if lacking := prompts.missing(text, 2):
        raise StageError(f"the template {tournament.criterion}.txt lacks {' and '.join(sorted(lacking))}: the judge would not see them")
    files = {name: sources.find(path, "", key=f"tournament.responses.{name}") for name, path in tournament.responses.items()}
    settings = {
        "contestants": tournament.contestants,
        "limit": tournament.limit,
        "mode": judge.mode,
        "template": text,
        "ending": prompts.ENDINGS[judge.mode],
        "responses": {name: sources.identity(found, None, "") for name, found in files.items() if name in tournament.contestants},
    }
    inputs = {"demonstrations": demonstrations} | {f"samples-{n}": s for n, s in samples.items() if n in tournament.contestants}
    return Stage("evaluation/tournament/questions", settings, inputs, demand="the driver", version=2)


def write_questions(tournament: Tournament) -> Work:
    """Returns the work of the stage."""

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        (stage,) = stages
        rows, numbers = [], {"games": 0, "equal": 0, "missing": 0}
        for game in _games(run, stage, tournament, warn=True):
            numbers["games"] += 1
            if None in (game["response_first"], game["response_second"]):
                numbers["missing"] += 1
            elif game["response_first"] == game["response_second"]:
                numbers["equal"] += 1
            else:
                rows += _questions(game, stage.settings)
        if not rows and not numbers["equal"]:
            raise StageError(f"{stage.name}: no prompt has responses of two contestants: were they given to the same prompts?")
        for number, first in enumerate(range(0, max(1, len(rows)), QUESTIONS_A_FILE)):
            write_rows(run.directory(stage) / f"{number:05d}.parquet", rows[first : first + QUESTIONS_A_FILE], QUESTION)
        return {stage.name: numbers | {"questions": len(rows)}}

    return work


def _questions(game: dict[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    responses = game["response_first"], game["response_second"]
    named = {"id": game["id"], "first": game["first"], "second": game["second"], "kind": settings["mode"]}
    return [
        named | {"part": part, "question": prompts.fill(settings["template"], game["messages"], order, settings["mode"])}
        for part, order in enumerate((responses, responses[::-1]))
    ]


def _games(run: Run, stage: Stage, tournament: Tournament, warn: bool = False) -> Iterator[dict[str, Any]]:
    """Every pair of contestants on every prompt, with its two responses (None where one has none); `warn` of rows that are not used."""
    prompted = _rows(run.directory(stage.inputs["demonstrations"]) / "train", ["id", "prompt", "response"])
    prompted = prompted[: stage.settings["limit"]]
    said: dict[str, Mapping[str, str]] = {}
    for name in stage.settings["contestants"]:
        if name == DEMONSTRATIONS:
            said[name] = {row["id"]: row["response"] for row in prompted}
        elif f"samples-{name}" in stage.inputs:
            rows = _rows(run.directory(stage.inputs[f"samples-{name}"]) / "train", ["id", "sample", "response"])
            said[name] = {row["id"]: row["response"] for row in rows if row["sample"] == 0}
        else:
            said[name] = from_files(name, tournament.responses[name], prompted, warn)
    for first, second in itertools.combinations(said, 2):
        for row in prompted:
            responses = {"response_first": said[first].get(row["id"]), "response_second": said[second].get(row["id"])}
            yield {"id": row["id"], "first": first, "second": second, "messages": row["prompt"]} | responses


def _rows(folder: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    return [row for path in shards(folder) for row in pq.read_table(path, columns=columns).to_pylist()]


def plan_games(questions: Stage, answers: Stage, tournament: Tournament) -> Stage:
    """The stage that reads the answers."""
    settings, inputs = {"seed": tournament.seed}, {"questions": questions, "answers": answers}
    return Stage("evaluation/tournament/games", settings, inputs, demand="the driver", version=3)


def judge_games(tournament: Tournament, judge: Judge) -> Work:
    """Returns the work of the stage: GAME rows, and the numbers of the tournament.

    Raises (the work):
        StageError: too many verdicts cannot be read.
    """

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        (stage,) = stages
        answers: dict[tuple[str, str, str, int], dict[str, Any]] = {}
        for row in _rows(run.directory(stage.inputs["answers"])):
            answers[row["id"], row["first"], row["second"], row["part"]] = row
        games = []
        for game in _games(run, stage.inputs["questions"], tournament):
            if None not in (game["response_first"], game["response_second"]):
                key = game["id"], game["first"], game["second"]
                games.append(_judged(game, answers.get((*key, 0)), answers.get((*key, 1))))
        write_rows(run.directory(stage) / "games.parquet", games, GAME)
        verdicts = [(game[order], game[said]) for game in games if game.get("given") for order, said in ORDERS]
        check_read(stage, [said for read, said in verdicts if read == "unparsed"], len(verdicts), judge)
        missing = run.numbers(stage.inputs["questions"])["missing"]
        cut = sum(bool(answer["cut"]) for answer in answers.values())
        return {stage.name: numbers(games, stage.inputs["questions"].settings["contestants"], stage.settings["seed"], missing, cut)}

    return work


def _judged(game: dict[str, Any], given: dict[str, Any] | None, swapped: dict[str, Any] | None) -> dict[str, Any]:
    row = {name: game[name] for name in ("id", "first", "second", "response_first", "response_second")}
    if given is None or swapped is None:
        assert game["response_first"] == game["response_second"], "what differs is asked in both orders"
        return row | {"outcome": "tie"}
    row |= {"question": given["question"], "answer": given["text"]}
    row |= {"question_swapped": swapped["question"], "answer_swapped": swapped["text"]}
    if given["failed"] or swapped["failed"]:
        return row | {"outcome": "failed"}
    readings = [_reading(given), turned(_reading(swapped))]
    return row | {"outcome": WORDS[winner(readings)], "given": WORDS[readings[0]], "swapped": WORDS[readings[1]]}


def _reading(answer: dict[str, Any]) -> Reading:
    """The verdict of one order, told of that order."""
    return read_probabilities(answer["logps"])[0] if answer["kind"] == "logprob" else read_pair(answer["text"], answer["cut"])


def numbers(games: list[dict[str, Any]], contestants: list[str], seed: int, missing: int = 0, cut: int = 0) -> dict[str, Any]:
    """What GAME rows say: `pairs` (win, tie, lose of each pair), `ranking` (empty where nobody won), `position` (bias and consistency of
    the judge), `failed` and `unparsed` games, those `missing` because somebody has no response to the prompt, and how many answers were
    `cut`."""
    heard = [game for game in games if game["outcome"] != "failed"]
    read = [game for game in heard if game["outcome"] != "unparsed"]
    number = {name: k for k, name in enumerate(contestants)}
    pairs = []
    for first, second in itertools.combinations(contestants, 2):
        own = [game for game in heard if (game["first"], game["second"]) == (first, second)]
        counted = [game for game in own if game["outcome"] != "unparsed"]
        won = np.array([points(READINGS[game["outcome"]]) for game in counted])
        longer = np.array([float(len(game["response_first"]) - len(game["response_second"])) for game in counted])
        # Of games that all ended alike the prior alone would speak.
        controlled = length_controlled(won, longer, [game["id"] for game in counted], seed) if len(set(won.tolist())) > 1 else None
        found = shares([READINGS[game["outcome"]] for game in own])
        found["failed"] = sum((game["first"], game["second"]) == (first, second) for game in games) - len(own)
        longer_wins = [game["outcome"] == ("first" if gap > 0 else "second") for game, gap in zip(counted, longer, strict=True) if gap]
        length = {"length_controlled": controlled, "longer": float(longer.mean()) if len(longer) else None}
        length["longer_wins"] = sum(longer_wins) / len(longer_wins) if longer_wins else None
        pairs.append({"first": first, "second": second, **found, **length})
    played = [(g["id"], number[g["first"]], number[g["second"]], points(READINGS[g["outcome"]])) for g in read]
    asked = [(READINGS[game["given"]], READINGS[game["swapped"]]) for game in heard if game.get("given")]
    return {
        "pairs": pairs,
        "ranking": ranking(contestants, played, seed) if _decided(read) else [],
        "position": position_bias(asked),
        "games": len(games),
        "failed": len(games) - len(heard),
        "unparsed": len(heard) - len(read),
        "missing": missing,
        "cut": cut,
    }


def _decided(games: list[dict[str, Any]]) -> bool:
    """Whether anybody won one."""
    return any(game["outcome"] in ("first", "second") for game in games)


def rates(found: Mapping[str, Any]) -> list[tuple[float | None, int]]:
    """Shares of won, tied and lost games, each with how many it is over; for `pipelines.means.ends`."""
    return [(pair[name], pair["n"]) for pair in found.get("pairs", ()) for name in ("win", "tie", "lose")]


def tables(found: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Tables for a person, by title; the header first."""
    pairs = [["first", "second", "win", "tie", "lose", "n", "unread", "no answer", "at equal length"]]
    for pair in found["pairs"]:
        controlled = pair["length_controlled"]
        won = [cell(pair[name], pair[f"{name}_stderr"], 2) for name in ("win", "tie", "lose")]
        rate = cell(controlled["rate"], controlled["stderr"], 2) if controlled else ""
        pairs.append([pair["first"], pair["second"], *won, str(pair["n"]), str(pair["unparsed"]), str(pair["failed"]), rate])
    ranks = [["contestant", "rating", "95 % band", "games"]]
    for row in found["ranking"]:
        rated = [f"{row['rating']:.0f}", f"{row['low']:.0f} to {row['high']:.0f}"] if row["games"] else ["", ""]
        ranks.append([row["name"], *rated, str(row["games"])])
    position = found["position"]
    judge = [["how often", "share", "±", "of"]]
    judge.append(["a winner is the response shown first (0.5 is fair)", *_cells(position["first"], position["stderr"])])
    judge[-1].append(f"{position['answers']} answers")
    judge.append(["both orders say the same", *_cells(position["consistent"]), f"{position['n']} games"])
    shown = {"Tournament: games of the first against the second": pairs}
    return shown | ({"Ranking (Bradley-Terry, on the scale of Elo)": ranks} if found["ranking"] else {}) | {"The judge": judge}


def _cells(share: float | None, error: float | None = None) -> list[str]:
    return ["" if value is None else f"{value:.2f}" for value in (share, error)]


def doubts(found: Mapping[str, Any]) -> list[str]:
    """Warns of a judge whose verdicts say little."""
    told, position = [], found["position"]
    if not found["ranking"]:
        told.append("nobody won a game: there is no ranking")
    if found["ranking"] and all(1 in (pair["win"], pair["tie"], pair["lose"]) for pair in found["pairs"] if pair["n"]):
        told.append("the games of every pair all ended alike: how far ratings are apart is not known, whatever their bands say")
    if position["first"] is not None and abs(position["first"] - 0.5) > 0.1 and position.get("p", 0.0) < 0.05:
        told.append(
            f"the judge is biased by position: {position['first']:.2f} of its choices name the response that it was shown first "
            "(0.5 would be fair); both orders are asked, so that this gives ties, not wins"
        )
    if position["consistent"] is not None and position["consistent"] < 0.5:
        told.append(f"the judge agrees with itself in {position['consistent']:.2f} of the games when the order is swapped")
    if found["failed"]:
        told.append(f"{found['failed']} of {found['games']} games have no answer of the judge: they count for nobody")
    if found["missing"]:
        told.append(f"{found['missing']} games were not played: one of the two has no response to the prompt")
    if found["unparsed"] > 0.1 * max(1, found["games"]):
        cut = f"; {found['cut']} answers were cut at judge.max_new_tokens: raise it" if found["cut"] else ""
        told.append(f"{found['unparsed']} of {found['games']} verdicts could not be read: they count for nobody{cut}")
    fewest = min((pair["n"] for pair in found["pairs"]), default=0)
    if fewest < FEW:
        told.append(f"some pairs met on {fewest} prompts only: standard errors and bands over so few say little")
    return told
