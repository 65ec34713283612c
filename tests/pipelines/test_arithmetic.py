"""The generated problems: right, varied, and with nothing held out that is trained on."""

import re

import pytest

from pipelines.data.arithmetic import TEMPLATES, problems, solve


def test_solutions_are_arithmetically_right_and_end_in_their_answer() -> None:
    for problem in problems(300, seed=1, held_out=False):
        *steps, last = problem["answer"].splitlines()
        equations = [re.search(r"(\d+) ([-+*/]) (\d+) = (\d+)", step) for step in steps]
        assert 2 <= len(steps) <= 4
        result = 0
        for found in equations:
            assert found
            left, sign, right, result = int(found[1]), found[2], int(found[3]), int(found[4])
            assert {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[sign] == result
        assert last == f"#### {result}"


def test_templates_are_many_and_all_used() -> None:
    assert len(TEMPLATES) >= 25
    openings = {
        re.sub(r"\d+|[A-Z][a-z]+|apples|books|stamps|marbles|cards|shells|pencils|cookies|stickers|coins", "_", p["question"])
        for p in problems(300, 0, False)
    }
    assert len(openings) >= 25


def test_the_seed_decides_and_problems_are_distinct() -> None:
    assert list(problems(60, 5, False)) == list(problems(60, 5, False)) != list(problems(60, 6, False))
    questions = [p["question"] for p in problems(500, 0, False)]
    assert len(set(questions)) == 500


def test_held_out_numbers_are_never_trained_on() -> None:
    def stripped(held_out: bool) -> set[str]:
        # Names and things do not make a problem another one.
        words = r"[A-Z][a-z]+|apples|books|stamps|marbles|cards|shells|pencils|cookies|stickers|coins"
        return {re.sub(words, "_", p["question"]) for seed in range(4) for p in problems(500, seed, held_out)}

    assert not stripped(True) & stripped(False)


def test_more_problems_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="there are about"):
        list(problems(10**6, 0, True))


def test_a_step_that_is_no_positive_whole_number_is_no_problem() -> None:
    template = TEMPLATES[5]
    assert solve(template, {"a": 12, "b": 5, "c": 3}) == []
    assert solve(template, {"a": 12, "b": 4, "c": 3}) == [3, 6]
