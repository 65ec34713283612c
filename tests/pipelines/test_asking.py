"""What a judge is asked, once: its limits, its failures, and what is kept of its answers."""

import itertools
import re
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from judges import completion, endpoint, longer
from tournaments import ALIKE, FEW, ROWS, Played

from pipelines import judging, tournament
from pipelines.judges import asking
from pipelines.judges.answers import Cache
from pipelines.judges.endpoint import seconds
from pipelines.judges.settings import Judge
from pipelines.records import write_rows
from pipelines.run.artifacts import Run, Stage, StageError


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
        for number, (concurrency, rate) in enumerate([(1, None), (16, None), (16, 6000)]):
            limits: dict[str, Any] = {
                "price_in": 1,
                "price_out": 5,
                "max_cost": 0.0007,
                "concurrency": concurrency,
                "requests_per_minute": rate,
            }
            with pytest.raises(StageError, match=r"judge.max_cost=0.0007 is spent, or too little .* 4 answers came and are kept"):
                Played(tmp_path / str(number)).play(url=url, **limits)
            assert len(asked) == 4 * (number + 1), "four cost 0.0006, however many would be asked at a time"
        asked.clear()
        with pytest.raises(StageError, match="4 answers came and are kept"):
            Played(tmp_path / "to the last").play(url=url, price_in=1, price_out=5, max_cost=0.0006, requests_per_minute=6000)
        assert len(asked) == 4
        found = Played(tmp_path / "all").play(url=url, price_in=1, price_out=5)
    assert found["asking"]["cost"] == pytest.approx(36 * 150e-6)
    free = (200, {key: value for key, value in completion("[[A]]", {"model": "m"}).items() if key != "usage"})
    with endpoint(lambda question: free) as (url, asked), pytest.raises(StageError, match=r"judge.max_cost cannot be kept"):
        Played(tmp_path / "free").play(url=url, price_in=1, max_cost=1)
    assert len(asked) == 1 and len(Cache(tmp_path / "free" / "judge_answers.jsonl").answers) == 1, "what was paid for is kept"


def test_what_each_question_costs_is_learnt_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)
    dear: dict[str, Any] = {"price_in": 1, "max_cost": 10}

    def costing(text: str, first: int, then: int) -> Callable[[str], Any]:
        prices = itertools.chain([first], itertools.repeat(then))
        usage = lambda: {"prompt_tokens": next(prices) * 10**6, "completion_tokens": 1, "total_tokens": 1}  # noqa: E731
        return lambda question: (200, completion(text, {"model": "m"}) | {"usage": usage()})

    with endpoint(costing("[[A]]", 1, 5)) as (url, asked):
        with pytest.raises(StageError, match=r"judge.max_cost=10 is spent, or too little"):
            Played(tmp_path / "growing").play(url=url, requests_per_minute=300, **dear)
        # 1 + 5; nine more looked cheap, and waited for their turn when the second one's price was known.
        assert len(asked) == 2
    with endpoint(costing("", 3, 3)) as (url, asked):
        with pytest.raises(StageError, match=r"judge.max_cost=10 is spent, or too little"):
            Played(tmp_path / "blank").play(url=url, **dear)
        assert len(asked) == 3, "an answer of no use is paid for as well"
    with endpoint(costing("[[A]]", 5, 5)) as (url, asked):
        judge, ask = Judge(url=url, url_model="m", **dear), judging.ask(Judge(url=url, url_model="m", **dear), False)
        for name, there in (("one", 2), ("other", 2)):
            played = Played(tmp_path / name)
            questions = tournament.plan_questions(played.data, played.samples, played.settings, judge)
            played.run.do(tournament.write_questions(played.settings), questions)
            with pytest.raises(StageError, match=r"judge.max_cost=10 is spent, or too little"):
                played.run.do(ask, judging.plan("answers", questions, judge, None))
            assert len(asked) == there, "who asks next has nothing left"


def test_who_waits_for_money_does_not_ask_when_too_many_have_failed(tmp_path: Path) -> None:
    refused = (400, {"error": {"message": "no"}})
    with endpoint(lambda question: refused) as (url, asked):
        with pytest.raises(StageError, match=r"1 of 36 questions got no answer.*35 more were then not asked"):
            Played(tmp_path).play(url=url, price_in=1, max_cost=10, concurrency=16)
        assert len(asked) == 1


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


@pytest.mark.parametrize("wrong", WRONG)
def test_an_endpoint_in_trouble_is_asked_again(wrong: tuple[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)
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
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)
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


def test_an_endpoint_that_is_slow_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)
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
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)
    with endpoint(lambda question: (500, "down") if "Say 0." in question else longer(question)) as (url, asked):
        why = (
            r"1 of 36 questions got no answer \(35 more were then not asked\), more than judge.max_failed_fraction=0.02: 1 x .*answers 500"
        )
        with pytest.raises(StageError, match=why):
            Played(tmp_path).play(url=url, retries=1, concurrency=1)
        assert len(asked) == 2, "one is too many already: no other is asked"
        found = Played(tmp_path / "allowed").play(url=url, retries=1, max_failed_fraction=0.2)
    assert found["failed"] == 3 and [pair["n"] for pair in found["pairs"]] == [ROWS - 1] * 3
    games = next(iter(tournament.tables(found).values()))
    assert [row[games[0].index("no answer")] for row in games[1:]] == ["1"] * 3
    assert tournament.doubts(found) == [
        ALIKE,
        "3 of 18 games have no answer of the judge: they count for nobody",
        FEW.format(ROWS - 1),
    ]


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)
    with pytest.raises(StageError, match="36 of 36 questions got no answer"):
        Played(tmp_path).play(url="http://127.0.0.1:9/v1", retries=1, max_failed_fraction=0.99)


def test_a_key_that_is_refused_stops_at_once(tmp_path: Path) -> None:
    with endpoint(lambda question: (401, {"error": {"message": "who?"}})) as (url, asked):
        with pytest.raises(StageError, match="refuses the key in GSIL_JUDGE_KEY: set that variable"):
            Played(tmp_path).play(url=url, concurrency=1)
        assert len(asked) == 1


def test_a_question_that_is_refused_is_not_asked_again(tmp_path: Path) -> None:
    # In words that tell of no key of ours.
    with endpoint(lambda question: (400, {"error": {"message": "it refuses\n the key 'seed'"}})) as (url, asked):
        with pytest.raises(StageError, match=rf"1 of 36 questions got no answer.*endpoint {url} answers 400: .*refuses.*the key"):
            Played(tmp_path).play(url=url, concurrency=1)
        assert len(asked) == 1


def test_a_page_for_browsers_is_no_judge_and_is_not_asked_again(tmp_path: Path) -> None:
    for folder, headers in (("a", {"content-type": "text/html"}), ("b", {"content-type": "application/json"})):
        sign_in = (200, "<!DOCTYPE html>\n<html>\n<title>Sign in</title>" + "x" * 200, headers)
        with endpoint(lambda question, page=sign_in: page) as (url, asked):  # type: ignore[misc]
            why = rf"1 x the judge's endpoint {url} answers with a page for browsers.*set judge.url.*<!DOCTYPE html> <html> <title>Sign in"
            with pytest.raises(StageError, match=why) as error:
                Played(tmp_path / folder).play(url=url, concurrency=1)
            assert len(asked) == 1 and "x" * 100 not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"error": {"message": "quota exceeded", "code": 1}}, "answers with an error: quota exceeded"),
        ({"result": "[[A]]"}, 'answers with no chat completion, but with \'{"result":"[[A]]"}\''),
        ({"error": "quota exceeded"}, 'answers with no chat completion, but with \'{"error":"quota exceeded"}\''),
        ([1], "answers with no chat completion, but with '[1]'"),
        ("no json", "answers with no chat completion, but with 'no json'"),
    ],
)
def test_what_is_no_completion_is_quoted_and_its_first_failure_told(
    wrong: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)
    with endpoint(lambda question: (200, wrong)) as (url, asked):
        with pytest.raises(StageError, match=re.escape(f"the judge's endpoint {url} {why}")):
            Played(tmp_path).play(url=url, retries=2, concurrency=1, max_failed_fraction=0.05)
        assert len(asked) == 6
    told = [record.getMessage() for record in caplog.records if "it is asked again" in record.getMessage()]
    assert told == [f"the judge's endpoint {url} {why}; it is asked again, up to 2 times a question, with growing waits"]
