"""Tournaments before judges of known character: rules, limits, failures, resume."""

import json
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from judges import always_a, completion, endpoint, longer

from pipelines import judging, tournament
from pipelines.artifacts import Run, Stage, StageError
from pipelines.judge_answers import Cache
from pipelines.judge_endpoint import seconds
from pipelines.judging_settings import Judge, Tournament
from pipelines.records import DEMONSTRATION, SAMPLE, write_rows

ROWS = 6
FEW = "some pairs met on {} prompts only: standard errors and bands over so few say little"
LENGTHS = {"demonstrations": 5, "short": 3, "long": 9}
"""Words of a response; each row one more."""


def prompt(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Say {number}."}]


def words(name: str, number: int) -> str:
    return " ".join(["word"] * (LENGTHS[name] + number))


class Played:
    """A tournament of fabricated policies, in a run directory of its own."""

    def __init__(self, root: Path, **options: Any):
        self.run = Run(root)
        self.data = Stage("prompts", {})
        samples = {name: Stage(f"{name}/answers", {}) for name in ("short", "long")}
        rows = [{"id": f"r{k}", "prompt": prompt(k), "response": words("demonstrations", k)} for k in range(ROWS)]
        self._write(self.data, [row | {"source": "", "prompt_ids": [], "response_ids": []} for row in rows], DEMONSTRATION)
        for name, stage in samples.items():
            made = [row | {"response": words(name, k), "iteration": 0, "sample": 0, "finish_reason": "stop"} for k, row in enumerate(rows)]
            self._write(stage, [row | {"prompt_ids": [], "response_ids": []} for row in made], SAMPLE)
        self.settings = Tournament(contestants=["short", "long", "demonstrations"], **options)
        self.samples = samples

    def _write(self, stage: Stage, rows: list[dict[str, Any]], schema: Any) -> None:
        folder = self.run.directory(stage) / "train"
        folder.mkdir(parents=True)
        write_rows(folder / "00000.parquet", rows, schema)

    def play(self, **judge: Any) -> dict[str, Any]:
        """Its numbers, and those of the asking under "asking"."""
        asked = Judge(url_model="m", **judge)
        questions = tournament.plan_questions(self.data, self.samples, self.settings, asked)
        answers = judging.plan("evaluation/tournament/answers", questions, asked, None)
        games = tournament.plan_games(questions, answers, self.settings)
        self.run.do(tournament.write_questions(self.settings), questions)
        self.run.do(judging.ask(asked, False), answers)
        self.run.do(tournament.judge_games(self.settings), games)
        return self.run.numbers(games) | {"asking": self.run.numbers(answers)}

    def games(self) -> list[dict[str, Any]]:
        return pq.read_table(self.run.root / "evaluation" / "tournament" / "games" / "games.parquet").to_pylist()


def test_a_judge_that_always_says_a_gives_nothing_but_ties(tmp_path: Path) -> None:
    with endpoint(always_a) as (url, asked):
        found = Played(tmp_path).play(url=url)
    assert [(pair["win"], pair["tie"], pair["lose"], pair["n"]) for pair in found["pairs"]] == [(0, 1, 0, ROWS)] * 3
    assert found["position"] == {"first": 1.0, "answers": 6 * ROWS, "stderr": 0.0, "consistent": 0.0, "n": 3 * ROWS}
    assert [row["rating"] for row in found["ranking"]] == pytest.approx([1000] * 3)
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
    assert found["position"]["first"] == 0.5 and found["position"]["consistent"] == 1.0 and tournament.doubts(found) == [FEW.format(ROWS)]
    (game,) = [g for g in played.games() if (g["id"], g["first"], g["second"]) == ("r0", "short", "long")]
    assert game["outcome"] == "second" and "Say 0." in game["question"] and game["answer"] == "[[B]]" and game["answer_swapped"] == "[[A]]"
    assert game["question"].index(words("short", 0)) < game["question"].index(words("long", 0))


def test_words_that_say_nothing_are_no_ties(tmp_path: Path) -> None:
    with endpoint(lambda question: "Hm.") as (url, _):
        found = Played(tmp_path).play(url=url)
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


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    with endpoint(longer) as (url, asked):
        with pytest.raises(StageError, match=r"judge.max_requests=10 requests are made; 10 answers came and are kept"):
            Played(tmp_path / "a").play(url=url, max_requests=10, cache=str(tmp_path / "cache.jsonl"), concurrency=3)
        assert len(asked) == 10
        with (tmp_path / "cache.jsonl").open("a") as file:
            file.write('{"key": "cut o')
        found = Played(tmp_path / "b").play(url=url, cache=str(tmp_path / "cache.jsonl"))
        assert len(asked) == 36 and found["asking"]["cached"] == 10 and found["asking"]["asked"] == 26
        again = Played(tmp_path / "c").play(url=url, cache=str(tmp_path / "cache.jsonl"))
        assert len(asked) == 36 and again["pairs"] == found["pairs"]


def test_an_answer_before_which_a_job_was_killed_is_not_glued_to_the_last(tmp_path: Path) -> None:
    for key, known in (("a", 0), ("b", 1), ("c", 2)):
        cache = Cache(tmp_path / "cache.jsonl")
        assert len(cache.answers) == known
        cache.take(key, {"text": key})
        cache.close()
        # Killed before the end of the line.
        (tmp_path / "cache.jsonl").write_text((tmp_path / "cache.jsonl").read_text().removesuffix("\n"))
    assert Cache(tmp_path / "cache.jsonl").answers == {key: {"text": key} for key in "abc"}
    lines = (tmp_path / "cache.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cache.jsonl").write_bytes(
        b"".join([lines[0].replace(b'"a"}', b'"b"}'), lines[1].replace(b'"text"', b'"t\xf4xt"'), lines[2]])
    )
    assert Cache(tmp_path / "cache.jsonl").answers == {"c": {"text": "c"}}, "what was changed on disk is asked again"


def test_a_judge_with_more_room_is_asked_what_was_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, questions, model = Run(tmp_path), Stage("questions", {}), Stage("model", {})
    run.directory(questions).mkdir(parents=True)
    rows = [{"id": text, "first": "a", "second": "b", "part": 0, "kind": "text", "question": text} for text in ("short", "so long" * 99)]
    write_rows(run.directory(questions) / "00000.parquet", rows, judging.QUESTION)
    asked: list[list[str]] = []

    def here(run: Run, stage: Stage, judge: Judge, cache: Cache, missing: dict[str, Any], trust_remote_code: bool) -> dict[str, str]:
        asked.append([row["question"] for row in missing.values()])
        fitting = [key for key, row in missing.items() if len(row["question"]) <= judge.max_model_len]
        for key in fitting:
            cache.take(key, {"text": "[[A]]", "logps": None, "cut": False, "read": 1, "written": 1})
        return {key: "too long" for key in missing if key not in fitting}

    # An engine would take a minute to say the same.
    monkeypatch.setattr(judging, "_ask_here", here)
    failed = []
    for room in (300, 3000, 3000):
        judge = Judge(path="m", max_model_len=room, max_failed_fraction=0.5)
        stage = judging.plan("answers", questions, judge, model)
        run.do(judging.ask(judge, False), stage)
        failed.append(run.numbers(stage)["failed"])
    assert failed == [1, 0, 0] and asked == [["short", "so long" * 99], ["so long" * 99]]
    elsewhere = [judging.plan("answers", questions, Judge(url="http://x/v1", url_model="m", max_model_len=k), None) for k in (300, 3000)]
    assert elsewhere[0].fingerprint == elsewhere[1].fingerprint, "an endpoint has room of its own"


def test_a_limit_of_cost(tmp_path: Path) -> None:
    with endpoint(longer) as (url, asked):
        # A question costs 100 x 1 + 10 x 5 millionths.
        with pytest.raises(StageError, match=r"judge.max_cost=0.0006 is spent; 4 answers came and are kept"):
            Played(tmp_path).play(url=url, price_in=1, price_out=5, max_cost=0.0006, concurrency=1)
        assert len(asked) == 4
        found = Played(tmp_path / "all").play(url=url, price_in=1, price_out=5)
    assert found["asking"]["cost"] == pytest.approx(36 * 150e-6)
    free = (200, {key: value for key, value in completion("[[A]]", {"model": "m"}).items() if key != "usage"})
    with endpoint(lambda question: free) as (url, asked), pytest.raises(StageError, match=r"judge.max_cost cannot be kept"):
        Played(tmp_path / "free").play(url=url, price_in=1, max_cost=1, concurrency=1)


def test_all_who_ask_share_the_limits(tmp_path: Path) -> None:
    with endpoint(longer) as (url, asked):
        one, other = Played(tmp_path / "one"), Played(tmp_path / "other")
        judge = Judge(url=url, url_model="m", max_requests=50, concurrency=1)
        ask = judging.ask(judge, False)
        questions = [tournament.plan_questions(played.data, played.samples, played.settings, judge) for played in (one, other)]
        for played, stage in zip((one, other), questions, strict=True):
            played.run.do(tournament.write_questions(played.settings), stage)
        one.run.do(ask, judging.plan("answers", questions[0], judge, None))
        with pytest.raises(StageError, match=r"judge.max_requests=50 requests are made; 14 answers came"):
            other.run.do(ask, judging.plan("answers", questions[1], judge, None))
        assert len(asked) == 50


def test_a_rate(tmp_path: Path) -> None:
    at: list[float] = []

    def judge(question: str) -> str:
        at.append(time.monotonic())
        return longer(question)

    with endpoint(judge) as (url, _):
        Played(tmp_path).play(url=url, requests_per_minute=1200)
    # The first request also waits for its connection.
    assert at[-1] - at[0] > 35 * 0.05 * 0.9 and len(at) == 36


class Moody:
    """A judge that answers every n-th request only, and else with something wrong."""

    def __init__(self, every: int, wrong: tuple[int, Any]):
        self.count, self.every, self.wrong = 0, every, wrong

    def __call__(self, question: str) -> str | tuple[int, Any]:
        self.count += 1
        return longer(question) if self.count % self.every == 0 else self.wrong


WRONG = [
    (500, "down"),
    (429, {"error": {"message": "slow down"}}),
    (200, "no json"),
    (200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": []}),
    (200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": {}}),
    (200, completion([{"type": "text", "text": "[[A]]"}], {"model": "m"})),
    (200, completion(7, {"model": "m"})),
    (200, completion("", {"model": "m"}) | {"usage": "much"}),
    (200, b'{"id": "x", "object": "chat.completion", "choices": [{"message": {"content": "[[A'),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_an_endpoint_in_trouble_is_asked_again(wrong: tuple[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "FIRST_WAIT", 0.01)
    with endpoint(Moody(2, wrong)) as (url, asked):
        found = Played(tmp_path).play(url=url, concurrency=1)
    assert len(asked) == 72 and found["failed"] == 0
    assert [(pair["win"], pair["tie"], pair["lose"]) for pair in found["pairs"]] == [(0, 0, 1), (0, 0, 1), (1, 0, 0)]


def test_an_endpoint_that_wants_an_hour_is_asked_another_time(tmp_path: Path) -> None:
    busy = (429, {"error": {"message": "slow down"}}, {"retry-after": "3600"})
    with endpoint(lambda question: busy) as (url, asked):
        with pytest.raises(StageError, match=r"left alone for 3600 s; 0 answers came and are kept"):
            Played(tmp_path).play(url=url, concurrency=1)
        assert len(asked) == 1


def test_an_endpoint_is_left_alone_as_long_as_it_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "FIRST_WAIT", 0.01)
    at: list[float] = []

    def busy_at_first(question: str) -> Any:
        at.append(time.monotonic())
        return (429, {"error": {"message": "slow down"}}, {"retry-after": "0.7"}) if len(at) == 1 else longer(question)

    with endpoint(busy_at_first) as (url, _):
        Played(tmp_path).play(url=url, concurrency=1)
    assert at[1] - at[0] >= 0.7


def test_a_header_that_says_when() -> None:
    assert seconds("1.5") == 1.5 and seconds("-3") == 0 and seconds("soon") is None and seconds("") is None
    assert seconds(formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=2)


def test_an_answer_that_was_cut_counts_by_its_mark_alone(tmp_path: Path) -> None:
    def cut(question: str) -> Any:
        text = "[[A]] because" if "Say 0." in question else "The winner is A"
        return 200, completion(text, {"model": "m"}, ended="length")

    with endpoint(cut) as (url, _):
        found = Played(tmp_path).play(url=url)
    assert [(pair["tie"], pair["n"], pair["unparsed"]) for pair in found["pairs"]] == [(1, 1, ROWS - 1)] * 3
    assert "count for nobody; 36 answers were cut at judge.max_new_tokens: raise it" in str(tournament.doubts(found))
    with endpoint(lambda question: (200, completion("[[A]]", {"model": "m"}, ended="content_filter"))) as (url, asked):
        with pytest.raises(StageError, match=r"1 x the judge's endpoint stops its answer by a content filter"):
            Played(tmp_path / "filtered").play(url=url, concurrency=1)
        assert len(asked) == 1, "it would say the same again"


def test_an_endpoint_that_is_slow_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "FIRST_WAIT", 0.01)
    slept: list[str] = []

    def slow_at_first(question: str) -> str:
        if not slept:
            slept.append(question)
            time.sleep(1.5)
        return longer(question)

    with endpoint(slow_at_first) as (url, asked):
        found = Played(tmp_path).play(url=url, timeout=0.5, concurrency=1)
    assert found["failed"] == 0 and len(asked) > 36


def test_too_many_failures_fail_the_tournament(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "FIRST_WAIT", 0.01)
    with endpoint(lambda question: (500, "down") if "Say 0." in question else longer(question)) as (url, asked):
        why = r"1 of 36 questions got no answer, more than judge.max_failed_fraction=0.02: 1 x .*answers 500"
        with pytest.raises(StageError, match=why):
            Played(tmp_path).play(url=url, retries=1, concurrency=1)
        assert len(asked) == 2, "one is too many already: no other is asked"
        found = Played(tmp_path / "allowed").play(url=url, retries=1, max_failed_fraction=0.2)
    assert found["failed"] == 3 and [pair["n"] for pair in found["pairs"]] == [ROWS - 1] * 3
    games = next(iter(tournament.tables(found).values()))
    assert [row[games[0].index("no answer")] for row in games[1:]] == ["1"] * 3
    assert tournament.doubts(found) == [
        "3 of 18 games have no answer of the judge: they count for nobody",
        FEW.format(ROWS - 1),
    ]


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "FIRST_WAIT", 0.01)
    with pytest.raises(StageError, match="36 of 36 questions got no answer"):
        Played(tmp_path).play(url="http://127.0.0.1:9/v1", retries=1, max_failed_fraction=0.99)


def test_a_key_that_is_refused_stops_at_once(tmp_path: Path) -> None:
    with endpoint(lambda question: (401, {"error": {"message": "who?"}})) as (url, asked):
        with pytest.raises(StageError, match="refuses the key in GSIL_JUDGE_KEY: set that variable"):
            Played(tmp_path).play(url=url, concurrency=1)
        assert len(asked) == 1


def test_a_question_that_is_refused_is_not_asked_again(tmp_path: Path) -> None:
    # In words that tell of no key of ours.
    with endpoint(lambda question: (400, {"error": {"message": "it refuses the key 'seed'"}})) as (url, asked):
        with pytest.raises(StageError, match=r"1 of 36 questions got no answer.*answers 400"):
            Played(tmp_path).play(url=url, concurrency=1)
        assert len(asked) == 1


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
