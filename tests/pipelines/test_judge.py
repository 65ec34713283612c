"""What a judge is asked and how its words are read; a judge behind a URL."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from judges import always_a, completion, endpoint

from actors.judge import prompts
from actors.judge.verdicts import read_grade, read_pair, read_probabilities, turned, winner
from pipelines.serving.judging import Judge, UrlWriter
from pipelines.serving.protocol import Usage
from pipelines.serving.refusal import Refused
from pipelines.serving.reward_protocol import JudgeRequest, Verdict
from pipelines.serving.settings import JudgeService


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("The first is right. [[A]]", 0),
        ("[[A]] would be easy to say, but no: [[B]]", 1),
        ("Both are wrong. [[C]]", "tie"),
        ("My verdict: B", 1),
        ("The better response is **A**.", 0),
        ("Response B is long. The better response: A", 0),
        ("B", 1),
        (" (A). ", 0),
        ("A good question, and both try.", "unparsed"),
        ("", "unparsed"),
        ("The verdict is a tie; the answer is a bit long.", "unparsed"),
        ("[[D]]", "unparsed"),
        ("Winner: Assistant B", 1),
        ("The winner is (A).", 0),
        ("Answer B is wrong, so A wins.", "unparsed"),
        ("Answer A is incorrect.", "unparsed"),
        ("Neither answer A nor answer B is right. I call it a tie.", "unparsed"),
        ("The better response is not A.", "unparsed"),
        ("The winner is A's opponent.", "unparsed"),
        ("The better response is a matter of taste.", "unparsed"),
        (prompts.ENDINGS["text"], "unparsed"),
        (f"{prompts.ENDINGS['text']} [[B]]", 1),
        ("Verdict: A is worse than B.", "unparsed"),
        ("The winner is A? No: B answers better.", "unparsed"),
        ("My verdict: A and B are equally good.", "unparsed"),
        ("**Verdict:** B", 1),
        ("The better answer is A because it is right.", 0),
        ("Winner: **B**\n\nIt is right.", 1),
        (prompts.ENDINGS["text"][:-1], "unparsed"),
        (prompts.ENDINGS["text"].replace(" ", "\n").lower().replace("[[a]]", "[[A]]"), "unparsed"),
        (f"{prompts.ENDINGS['text'][:-1]} [[A]]", 0),
        ("[[A]] if response A is better, [[B]] if B is, or [[C]] if neither is.", "unparsed"),
        ("It is [[A]], [[B]], or [[C]].", "unparsed"),
        ("[[A]] or [[B]]?", "unparsed"),
        ("My vote is for [[A]].", 0),
        ("Clear. Then end with [[A]].", 0),
        ("It is a tie, or [[C]].", "tie"),
        ("I prefer [[A]] when both are read closely.", 0),
        ("Then end with **[[A]]** if response A is better, **[[B]]** if not, or **[[C]]** if neither is.", "unparsed"),
        ("Then end with `[[A]]` if A is, or `[[C]]` if neither is.", "unparsed"),
        ("[[A]] for A, [[B]] for response B, [[C]] for neither", "unparsed"),
        ("Response A leaves a stray <think> tag. [[B]]", 1),
        ("[[B]] since A leaves </think> in it", 1),
        ("Maybe [[B]]\n</think>\n\nNobody knows.", "unparsed"),
        ("<think>\nMaybe [[B]]\nor so", "unparsed"),
        ("<think>Maybe [[B]].</think>The first. [[A]]", 0),
        ("Maybe [[B]].</think>The first. [[A]]", 0),
    ],
)
def test_words_are_read(text: str, reading: object) -> None:
    assert read_pair(text) == reading


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Fine. [[7]]", 7),
        ("[[3]] at first, then [[8.5]]", 8.5),
        ("Rating: 6", 6),
        ("Rating: **10**/10", 10),
        ("[[11]]", None),
        ("[[0]]", None),
        ("good", None),
        ("[[8/10]]", 8),
        ("[[8]]/[[10]]", 8),
        ("I give 7. To get a score of 10 it would need more.", None),
        ("The rating is 7. A score of 10 needs more.", 7),
        (prompts.ENDINGS["grade"], None),
        (f"{prompts.ENDINGS['grade']} [[6]]", 6),
        ("I would rate it [[7]] out of [[10]].", 7),
        ("Rating: 1 to 10 scale, I give 7", None),
        ("Rating: 7.5 to 8", None),
        ("**Score:** 7.5 out of 10", 7.5),
        (prompts.ENDINGS["grade"][:-1], None),
        ("A whole number in brackets, such as [[5]]", None),
        ("[[7]] on a scale of [[1]] to [[10]].", 7),
        ("[[7]] on a scale from 1 to [[10]].", 7),
        ("In all that comes to [[7]].", 7),
        ("First I thought [[5]]. I raise it from 5 to [[8]].", 8),
        ("I lower it from [[8]] to [[6]].", 6),
        ("I raise it from [[3]] for [[8]].", 8),
    ],
)
def test_grades_are_read(text: str, grade: float | None) -> None:
    assert read_grade(text) == grade


def test_an_answer_that_was_cut_counts_by_its_mark_alone() -> None:
    assert read_pair("The winner is A", cut=True) == "unparsed" == read_pair("A", cut=True)
    assert read_pair("[[B]] because", cut=True) == 1 and read_grade("[[7]] because", cut=True) == 7
    assert read_grade("The rating is 1", cut=True) is None, "it may have been going to be 10"
    assert read_pair("<think>Maybe [[A]]", cut=True) == "unparsed", "it was still thinking"


@pytest.mark.parametrize("ending", ["text", "grade"])
def test_a_judge_that_says_again_how_to_answer_has_said_nothing_however_much_of_it(ending: str) -> None:
    told = prompts.ENDINGS[ending]
    for end in range(len(told) + 1):
        for said in (told[:end], told[:end].replace(" ", "  ")):
            assert read_pair(said, cut=True) == "unparsed" and read_grade(said, cut=True) is None, said


def test_both_orders_must_agree() -> None:
    assert winner([0, turned(1)]) == 0 and winner([1, turned(0)]) == 1
    assert winner([0, turned(0)]) == "tie" == winner(["tie", turned("tie")]) == winner([0, "tie"])
    assert winner([0, "unparsed"]) == "unparsed" == winner(["unparsed", "unparsed"])


def test_probabilities() -> None:
    reading, first = read_probabilities([math.log(0.3), math.log(0.1)])
    assert reading == 0 and first == pytest.approx(0.75)
    assert read_probabilities([-1e4, 0.0])[0] == 1 and read_probabilities([-1e4, 0.0])[1] < 1e-9
    nothing = ([math.nan, -1.0], [-1.0, math.nan], [-math.inf, -math.inf])
    assert {read_probabilities(logps)[0] for logps in nothing} == {"unparsed"} and read_probabilities([-1.0, -math.inf])[0] == 0
    assert read_probabilities([-2.0, -2.0]) == ("tie", 0.5) and read_probabilities([0.0, -1e4]) == (0, 1.0)


def test_responses_are_filled_in_as_they_are(tmp_path: Path) -> None:
    asked = prompts.fill("{conversation}|{first}|{second}|{other}", [{"role": "user", "content": "{first}"}], ["{second}", "b"], "text")
    assert asked.startswith("User: {first}|{second}|b|{other}\n\n") and "[[A]]" in asked
    for criterion in prompts.CRITERIA:
        assert prompts.places(prompts.template(criterion, graded=False)) == {"conversation", "first", "second"}
        assert prompts.places(prompts.template(criterion, graded=True)) - {"reference"} == {"conversation", "response"}
    (tmp_path / "helpful.txt").write_text("Mine: {first} {second}")
    assert prompts.template("helpful", False, tmp_path).startswith("Mine") and "Judge" in prompts.template("helpful", True, tmp_path)
    assert prompts.missing("{first}", 2) == {"second"} and not prompts.missing("{response}", 1)


def by_url(url: str, mode: str, **request: Any) -> Verdict:
    settings = JudgeService(url=url, url_model="gpt", url_key_env="SOME_KEY")
    asked = JudgeRequest.model_validate({"messages": [{"role": "user", "content": "2 and 3?"}], "mode": mode} | request)
    (verdict,) = asyncio.run(Judge("judge", UrlWriter(settings), settings)(asked))
    return verdict


def test_a_judge_behind_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    two, usage = {"responses": ["five", "six"]}, Usage.of(200, 20)
    with endpoint(always_a) as (url, asked):
        assert by_url(url, "text", **two) == Verdict(winner="tie", verdicts=[0, 1], explanation="Clear. [[A]]", usage=usage)
        assert {key for key, _ in asked} == {"Bearer secret"} and {body["temperature"] for _, body in asked} == {0}
        orders = [body["messages"][0]["content"] for _, body in asked]
        assert len(orders) == 2 and sorted(order.index("five") < order.index("six") for order in orders) == [False, True]
        found = by_url(url, "logprob", **two)
    with endpoint(lambda question: (200, completion("The winner is A", {"model": "gpt"}, ended="length"))) as (url, _):
        assert by_url(url, "text", **two).verdicts == ["unparsed", "unparsed"], "it was cut"
    assert found.verdicts == [0, 1] and f"probability {1 / (1 + math.exp(-3.9)):.3f}" in found.explanation


SAID = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "A"}}
BARE = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [SAID]}


@pytest.mark.parametrize(
    ("answer", "mode", "said"),
    [((400, {"error": {"message": "no"}}), "text", "answers 400"), ((200, BARE), "logprob", "without log-probs: judge.mode=logprob needs")],
)
def test_an_endpoint_that_cannot_judge(answer: tuple[int, Any], mode: str, said: str) -> None:
    with endpoint(lambda question: answer) as (url, _), pytest.raises(Refused, match=said) as refused:
        by_url(url, mode, responses=["five", "six"])
    assert refused.value.status == 503
