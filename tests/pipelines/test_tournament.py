"""Tournaments before judges of known character: the rules."""

import json
from pathlib import Path
from typing import Any

import pytest
from judges import always_a, completion, endpoint, longer
from tournaments import ALIKE, FEW, ROWS, Played, prompt, words

from pipelines import responses, tournament
from pipelines.judges.settings import Judge, Tournament
from pipelines.run.artifacts import Stage, StageError


def test_a_judge_that_always_says_a_gives_nothing_but_ties(tmp_path: Path) -> None:
    with endpoint(always_a) as (url, asked):
        found = Played(tmp_path).play(url=url)
    assert [(pair["win"], pair["tie"], pair["lose"], pair["n"]) for pair in found["pairs"]] == [(0, 1, 0, ROWS)] * 3
    position = {"first": 1.0, "answers": 6 * ROWS, "stderr": 0.0, "p": 0.5 ** (3 * ROWS - 1), "consistent": 0.0, "n": 3 * ROWS}
    assert found["position"] == pytest.approx(position)
    assert found["ranking"] == [] and "nobody won a game: there is no ranking" in tournament.doubts(found)
    assert any("biased by position" in text for text in tournament.doubts(found))
    assert {(body["temperature"], body["seed"]) for _, body in asked} == {(0, 0)} and len(asked) == 2 * 3 * ROWS
    assert tournament.tables(found)["The judge"][1:] == [
        ["a winner is the response shown first (0.5 is fair)", "1.00", "0.00", "36 answers"],
        ["both orders say the same", "0.00", "", "18 games"],
    ]


def test_a_judge_that_prefers_length_says_what_arithmetic_says(tmp_path: Path) -> None:
    played = Played(tmp_path)
    with endpoint(longer) as (url, _):
        found = played.play(url=url)
    pairs = {(pair["first"], pair["second"]): pair for pair in found["pairs"]}
    assert [(pair["win"], pair["tie"], pair["lose"]) for pair in pairs.values()] == [(0, 0, 1), (0, 0, 1), (1, 0, 0)]
    assert all(pair["longer_wins"] == 1.0 for pair in pairs.values())
    assert pairs["short", "long"]["longer"] == -5 * 6
    assert [row["name"] for row in found["ranking"]] == ["long", "demonstrations", "short"]
    assert found["position"]["first"] == 0.5 and found["position"]["consistent"] == 1.0
    assert tournament.doubts(found) == [ALIKE, FEW.format(ROWS)]
    (game,) = [g for g in played.games() if (g["id"], g["first"], g["second"]) == ("r0", "short", "long")]
    assert game["outcome"] == "second" and "Say 0." in game["question"] and game["answer"] == "[[B]]" and game["answer_swapped"] == "[[A]]"
    assert game["question"].index(words("short", 0)) < game["question"].index(words("long", 0))


def test_words_that_say_nothing_are_no_ties(tmp_path: Path) -> None:
    with endpoint(lambda question: "Hm.") as (url, _):
        with pytest.raises(
            StageError, match=r"36 of 36 verdicts of the judge cannot be read, more than .*=0.5. One says: 'Hm.'. All answers"
        ):
            Played(tmp_path).play(url=url)
        found = Played(tmp_path / "allowed").play(url=url, max_unread_fraction=1)
    assert [(pair["win"], pair["n"], pair["unparsed"]) for pair in found["pairs"]] == [(None, 0, ROWS)] * 3
    assert found["unparsed"] == 3 * ROWS and any("could not be read" in text for text in tournament.doubts(found))


def test_labels_by_probability(tmp_path: Path) -> None:
    with endpoint(always_a) as (url, asked):
        found = Played(tmp_path).play(url=url, mode="logprob")
    assert all(pair["tie"] == 1 for pair in found["pairs"]) and {body["max_tokens"] for _, body in asked} == {1}


def test_equal_responses_tie_without_a_question(tmp_path: Path) -> None:
    other = tmp_path / "others.jsonl"
    lines = [{"prompt": f"Say {k}.", "completion": words("long", k)} for k in range(ROWS - 1)] + [
        {"prompt": "Who?", "completion": "Nobody"}
    ]
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    played = Played(tmp_path / "run", responses={"theirs": str(other)})
    played.settings = played.settings.model_copy(update={"contestants": ["long", "theirs"]})
    with endpoint(longer) as (url, asked):
        found = played.play(url=url)
    assert not asked and [(pair["tie"], pair["n"]) for pair in found["pairs"]] == [(1, ROWS - 1)]


def test_a_prompt_that_is_there_twice_has_the_response_twice_and_one_with_a_system_turn_its_own(tmp_path: Path) -> None:
    other = tmp_path / "others.jsonl"
    system = [{"role": "system", "content": "Be short."}, *prompt(0)]
    lines = [{"messages": [*system, {"role": "assistant", "content": "short"}]}, {"prompt": "Say 0.", "completion": "plain"}]
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = [{"id": key, "prompt": messages} for key, messages in (("r0", prompt(0)), ("r1", prompt(0)), ("r2", system))]
    assert responses.from_files("theirs", str(other), asked, warn=True) == {"r0": "plain", "r1": "plain", "r2": "short"}
    other.write_text(json.dumps(lines[1]) + "\n")
    assert responses.from_files("theirs", str(other), asked, warn=True) == dict.fromkeys(("r0", "r1", "r2"), "plain")


def test_an_answer_that_was_cut_counts_by_its_mark_alone(tmp_path: Path) -> None:
    def cut(question: str) -> Any:
        text = "[[A]] because" if "Say 0." in question else "The winner is A"
        return 200, completion(text, {"model": "m"}, ended="length")

    with endpoint(cut) as (url, _):
        found = Played(tmp_path).play(url=url, max_unread_fraction=1)
    assert [(pair["tie"], pair["n"], pair["unparsed"]) for pair in found["pairs"]] == [(1, 1, ROWS - 1)] * 3
    assert "count for nobody; 36 answers were cut at judge.max_new_tokens: raise it" in str(tournament.doubts(found))
    with endpoint(lambda question: (200, completion("[[A]]", {"model": "m"}, ended="content_filter"))) as (url, asked):
        with pytest.raises(StageError, match=r"1 x the judge's endpoint stops its answer by a content filter"):
            Played(tmp_path / "filtered").play(url=url, concurrency=1)
        assert len(asked) == 1, "it would say the same again"


def test_who_is_not_there(tmp_path: Path) -> None:
    played = Played(tmp_path)
    played.settings = played.settings.model_copy(update={"contestants": ["short", "shrot"]})
    with pytest.raises(StageError, match="there is no 'shrot'; there are short, long, demonstrations"):
        played.play(url="http://x/v1")
    twice = Tournament(contestants=["short", "long"], responses={"short": "x.jsonl"})
    with pytest.raises(StageError, match="'short' is already somebody here"):
        tournament.plan_questions(played.data, played.samples, twice, Judge(url="http://x/v1", url_model="m"))
    named = played.samples | {"demonstrations": Stage("demonstrations/answers", {})}
    with pytest.raises(StageError, match="a policy is called 'demonstrations'"):
        tournament.plan_questions(
            played.data, named, Tournament(contestants=["short", "demonstrations"]), Judge(url="http://x/v1", url_model="m")
        )
    other = tmp_path / "none.jsonl"
    other.write_text(json.dumps({"prompt": "Who?", "completion": "Nobody"}) + "\n")
    played.settings = Tournament(contestants=["short", "theirs"], responses={"theirs": str(other)})
    with pytest.raises(StageError, match="holds no response to any of the prompts"):
        played.play(url="http://x/v1")


def test_responses_that_are_not_used_are_counted_in_the_log_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tmp_path / "others.jsonl"
    lines = [json.dumps({"prompt": f"Say {k}.", "completion": f"{k}"}) for k in range(ROWS)]
    again = [json.dumps({"prompt": "Say 0.", "completion": said}) for said in ("0", "nil", "null")]
    other.write_text("\n".join([*lines[:3], "{broken", *lines[3:], '{"prompt": "Say 1."}', *again]))
    played = Played(tmp_path / "run", responses={"theirs": str(other)})
    played.settings = played.settings.model_copy(update={"contestants": ["long", "theirs"]})
    with endpoint(longer) as (url, _):
        played.play(url=url)
    assert {game["response_second"] for game in played.games() if game["id"] == "r0"} == {"null"}
    told = [record.message for record in caplog.records if record.name == "pipelines.responses"]
    assert len(told) == 2 and told[0].startswith(
        "tournament.responses.theirs: 2 of 11 rows cannot be used. The first, others.jsonl:4: broken JSON"
    )
    assert told[1] == (
        "tournament.responses.theirs: 2 of 11 rows answer a prompt anew, of which the last answer counts. The first, others.jsonl:10"
    )
