"""Exact answers, means with errors, and when to stop or warn."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from actors.settings import Objective
from pipelines import evaluation, tasks, tournament
from pipelines.evaluation import exact_answer, final_number
from pipelines.means import cell, ends, mean_and_error
from pipelines.records import DEMONSTRATION, SAMPLE, write_rows
from pipelines.report import scoreboard
from pipelines.run.artifacts import Run, Stage, StageError
from pipelines.settings import Evaluation
from pipelines.summary import doubts, indistinguishable, reward_warnings, show, table


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = 4\n#### 4", 4),
        ("#### 1,234", 1234),
        ("#### $5.50", Decimal("5.5")),
        ("#### -7", -7),
        ("#### 4.00", 4),
        ("#### 3\n#### 8 apples", 8),
        ("#### 3\nand more 9", 3),
        ("the answer is 4", None),
        ("####", None),
        ("#### 4.\n#### 4.\n####", 4),
        ("#### 4 ####  ", 4),
        ("#### 4\n#### none", None),
        ("#### none", None),
        ("####\n18", 18),
        ("#### 18/2", None),
        ("#### 12:30", None),
        ("#### 1e3", None),
        ("#### 18 eggs", 18),
    ],
)
def test_the_final_number(text: str, number: int | Decimal | None) -> None:
    assert final_number(text) == number


def test_exact_answer_compares_numbers_not_text() -> None:
    assert exact_answer("so #### 1,000", "#### 1000")
    assert not exact_answer("1000", "#### 1000")
    assert exact_answer("#### 1", "no number") is None


def test_a_demonstration_without_an_answer_is_counted_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, data, samples = Run(tmp_path), Stage("demonstrations", {}), Stage("samples", {})
    stage = evaluation.plan("sft/evaluation", samples, data, Evaluation())

    def write(*demonstrations: str) -> None:
        rows = [{"id": str(k), "source": f"data.jsonl row {k}", "response": text} for k, text in enumerate(demonstrations)]
        for of, made, schema in ((data, rows, DEMONSTRATION), (samples, [row | {"response": "#### 1"} for row in rows], SAMPLE)):
            (run.directory(of) / "held_out").mkdir(parents=True, exist_ok=True)
            write_rows(run.directory(of) / "held_out" / "00000.parquet", made, schema)

    write("#### 1", "no number", "#### 2")
    run.do(evaluation.evaluate, stage)
    found = run.numbers(stage)
    assert (found["accuracy"], found["n"], found["unscored"]) == (0.5, 2, 1) and "the first is data.jsonl row 1" in caplog.text
    write("no number")
    with pytest.raises(StageError, match=r"the first is data\.jsonl row 0: set evaluation\.metric=none$"):
        Run(tmp_path).do(evaluation.evaluate, evaluation.plan("other/evaluation", samples, data, Evaluation()))


def test_a_gain_is_the_mean_difference_on_the_same_prompts(tmp_path: Path) -> None:
    run, data = Run(tmp_path), Stage("demonstrations", {})
    right, samples = ([True, True, False, False], [True, True, True, True]), []
    rows = [{"id": str(k), "source": f"row {k}", "prompt": [], "response": "#### 1"} for k in range(4)]
    run.directory(data).joinpath("held_out").mkdir(parents=True)
    write_rows(run.directory(data) / "held_out/00000.parquet", [r | {"prompt_ids": [], "response_ids": []} for r in rows], DEMONSTRATION)
    for name, answers in zip(("sft", "iteration-1"), right, strict=True):
        stage = Stage(f"{name}/samples", {})
        run.directory(stage).joinpath("held_out").mkdir(parents=True)
        # In another order, and of the later policy one prompt is missing.
        made = [(k, answer) for k, answer in enumerate(answers) if name == "sft" or k != 0][::-1]
        drawn = [{"id": str(k), "response": f"#### {int(answer)}", "finish_reason": "stop"} for k, answer in made]
        filled = {"iteration": 0, "sample": 0, "prompt": [], "prompt_ids": [], "response_ids": []}
        write_rows(run.directory(stage) / "held_out/00000.parquet", [row | filled for row in drawn], SAMPLE)
        samples.append(stage)
    before = evaluation.plan("sft/evaluation", samples[0], data, Evaluation())
    after = evaluation.plan("iteration-1/evaluation", samples[1], data, Evaluation(), before)
    run.do(evaluation.evaluate, before)
    run.do(evaluation.evaluate, after)
    assert "gain" not in run.numbers(before)
    # Of the three prompts that both answered, +0, +1, +1.
    gain = run.numbers(after)["gain"]
    assert gain == {"over": "sft", "mean": pytest.approx(2 / 3), "stderr": pytest.approx((1 / 3 / 3) ** 0.5), "n": 3}


def test_mean_and_standard_error_by_hand() -> None:
    mean, error = mean_and_error([1.0, 0.0, 1.0, 1.0])
    assert mean == 0.75 and error == pytest.approx((0.1875 * 4 / 3 / 4) ** 0.5)
    assert mean_and_error([]) == (None, None) and mean_and_error([1.0]) == (1.0, None)
    assert [cell(0.25, 0.0351, 2), cell(0.25, None, 3), cell(None, None, 2)] == ["0.25 ± 0.04", "0.250", ""]


def test_none_right_leaves_room_for_a_share_that_wilsons_interval_says() -> None:
    said = ends([(0.0, 104), (0.5, 104), (1.0, 40), (None, 0), (0.0, 104)])
    # The interval's end is where the share p is 1.96 of its own standard errors, sqrt(p (1 - p) / n), away from what was seen.
    assert pytest.approx(1.96, abs=1e-3) == 0.035636 / (0.035636 * (1 - 0.035636) / 104) ** 0.5
    assert said.endswith("the true share behind 40 of 40 is at least 0.912, behind 0 of 104 is at most 0.036.")
    assert ends([(0.5, 104)]) == ""


@pytest.mark.parametrize(
    ("accuracy", "n", "chance"),
    [(0.5, 64, True), (0.62, 64, True), (0.63, 64, False), (0.37, 64, False), (0.55, 1000, False), (0.5, 0, False)],
)
def test_told_apart_by_chance_means_within_two_standard_errors(accuracy: float, n: int, chance: bool) -> None:
    assert indistinguishable({"classification_accuracy": accuracy, "held_out_pairs": 4 * n, "held_out_prompts": n}) is chance, "of prompts"


def test_a_falling_reward_of_real_responses_is_told() -> None:
    assert reward_warnings("iteration-1", {"tail_reward_real": 0.1}, Objective()) == []
    noise = {"tail_reward_real": -0.006, "tail_reward_real_stderr": 0.005}
    assert reward_warnings("iteration-1", noise, Objective()) == [] and reward_warnings(
        "iteration-1", {**noise, "tail_reward_real": -0.02}, Objective()
    )
    assert "stays below zero (-0.200)" in reward_warnings("iteration-1", {"tail_reward_real": -0.2}, Objective())[0]
    assert "heads for -gamma (-0.800 of -1)" in reward_warnings("iteration-1", {"tail_reward_real": -0.8}, Objective(gamma=1.0))[0]
    assert "stays below" in reward_warnings("dil", {"tail_reward_real": -0.8}, Objective(name="simpo"))[0], "its gamma is a margin"


def test_results_of_few_rows_are_doubted() -> None:
    sure = {"classification_accuracy": 0.8, "held_out_pairs": 64, "held_out_prompts": 64, "rejected": 3}
    assert doubts("iteration-1", sure, 60) == []
    assert "trained on 5 pairs, 3 were dropped" in doubts("iteration-1", sure, 5)[0]
    assert "trained on 60 pairs, 90 were dropped" in doubts("iteration-1", sure | {"rejected": 90}, 60)[0]
    assert "1 held-out pairs, fewer than 16, cannot say" in doubts("iteration-1", sure | {"held_out_pairs": 1}, 60)[0]
    assert "worse than by chance (0.300 of 64)" in doubts("iteration-1", sure | {"classification_accuracy": 0.3}, 60)[0]


def test_the_table_shows_what_was_measured() -> None:
    trained = {"reward_real": 0.5, "reward_generated": -0.25, "classification_accuracy": 0.75, "held_out_pairs": 60}
    unmeasured, measured = {"accuracy": None, "stderr": None, "n": 0}, {"accuracy": 0.5, "stderr": 0.05, "n": 100}
    header, row = table({"base": unmeasured, "dil": unmeasured}, {"dil": trained}, {})
    assert header == ["policy", "reward real", "generated", "pairs told apart"] and row == ["dil", "0.500", "-0.250", "0.750 of 60"]
    gain = {"over": "base", "mean": 0.1, "stderr": 0.04, "n": 100}
    rows = table({"base": measured, "dil": measured}, {"dil": trained}, {"dil": gain})
    assert rows[0][4] == "gain on the one before" and rows[1][4] == ""
    assert rows[2][:5] == ["dil", "0.500", "0.050", "100", "+0.100 ± 0.040"]
    assert table({"base": measured, "sft": measured}, {}, {})[0] == ["policy", "accuracy", "±", "n"], "no column is empty"
    assert table({"dil": unmeasured}, {"dil": {"held_out_pairs": 0}}, {}) == [["policy"], ["dil"]]


def test_a_policy_that_was_compared_with_none_is_called_the_last() -> None:
    content: dict[str, Any] = {"run": "x", "final": "sft", "stopped": None, "iterations": [], "gains": {}, "warnings": []}
    for numbers, said in (
        ({"accuracy": None, "stderr": None, "n": 0}, "sft (the last one: no metric"),
        ({"accuracy": 1, "stderr": 0, "n": 9}, "sft,"),
    ):
        assert show(content | {"policies": {"sft": numbers}}, Path("runs/x")).lines[0].startswith(f"final policy: {said}")


def test_examples_that_are_rows_of_the_test_are_warned_of() -> None:
    found = {policy: {"arc": {"borrowed": True}, "gsm8k": {"borrowed": False}, "mmlu": {}} for policy in ("sft", "base")}
    assert tasks.doubts(found) == ["arc: no file has examples for it: they are other rows of those that are asked"]


@pytest.mark.parametrize("outcome", ["tie", "failed", "unparsed"])
def test_where_no_game_was_decided_nobody_is_ranked(outcome: str) -> None:
    games = [
        {"id": str(k), "first": "a", "second": second, "outcome": outcome if second == "b" else "second" if k else "tie"}
        | {"response_first": "x", "response_second": "y"}
        for k in range(20)
        for second in ("b", "c")
    ]
    undecided = tournament.numbers([game for game in games if game["second"] == "b"], ["a", "b"], seed=0)
    pairs, _ = scoreboard.tables({"tournament": undecided}).values()
    assert undecided["ranking"] == [] and pairs[1][-1] == ""
    assert "nobody won a game: there is no ranking" in tournament.doubts(undecided)
    pairs, ranks, _ = scoreboard.tables({"tournament": tournament.numbers(games, ["a", "b", "c"], seed=0)}).values()
    # At equal length: not of games that all ended alike.
    assert ranks[1][0] == "c" and int(ranks[1][1]) > 1000 and [bool(row[-1]) for row in pairs[1:]] == [False, True, False]
