"""What a judge is asked and how its words are read."""

import math
from pathlib import Path

import pytest

from actors.judge import prompts
from actors.judge.verdicts import read_grade, read_pair, read_probabilities, turned, winner


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
    ],
)
def test_grades_are_read(text: str, grade: float | None) -> None:
    assert read_grade(text) == grade


def test_both_orders_must_agree() -> None:
    assert winner([0, turned(1)]) == 0 and winner([1, turned(0)]) == 1
    assert winner([0, turned(0)]) == "tie" == winner(["tie", turned("tie")]) == winner([0, "tie"])
    assert winner([0, "unparsed"]) == "unparsed" == winner(["unparsed", "unparsed"])


def test_probabilities() -> None:
    reading, first = read_probabilities([math.log(0.3), math.log(0.1)])
    assert reading == 0 and first == pytest.approx(0.75)
    assert read_probabilities([-1e4, 0.0])[0] == 1 and read_probabilities([-1e4, 0.0])[1] < 1e-9
    assert read_probabilities([-2.0, -2.0]) == ("tie", 0.5) and read_probabilities([0.0, -1e4]) == (0, 1.0)


def test_responses_are_filled_in_as_they_are(tmp_path: Path) -> None:
    asked = prompts.fill("{conversation}|{first}|{second}|{other}", [{"role": "user", "content": "{first}"}], ["{second}", "b"], "text")
    assert asked.startswith("User: {first}|{second}|b|{other}\n\n") and "[[A]]" in asked
    for criterion in prompts.CRITERIA:
        assert prompts.places(prompts.template(criterion, graded=False)) == {"conversation", "first", "second"}
        assert prompts.places(prompts.template(criterion, graded=True)) == {"conversation", "response"}
    (tmp_path / "helpful.txt").write_text("Mine: {first} {second}")
    assert prompts.template("helpful", False, tmp_path).startswith("Mine") and "Judge" in prompts.template("helpful", True, tmp_path)
    assert prompts.missing("{first}", 2) == {"second"} and not prompts.missing("{response}", 1)
