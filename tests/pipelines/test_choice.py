"""Choosing and reporting from scores on disk, with numbers by hand."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines import best_of_n, best_of_n_report
from pipelines.best_of_n import Golden
from pipelines.records import SAMPLE, SCORE, write_rows
from pipelines.run.artifacts import Run, Stage, StageError
from pipelines.settings import Combination

SAMPLES = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]


def write(run: Run, name: str, rows: list[dict[str, Any]], schema: Any, **inputs: Stage) -> Stage:
    stage = Stage(name, {}, inputs)
    (run.directory(stage) / "held_out").mkdir(parents=True)
    write_rows(run.directory(stage) / "held_out/00000.parquet", rows, schema)
    return stage


def scores(run: Run, name: str, values: list[float | None], keys: list[tuple[str, int]] = SAMPLES, **inputs: Stage) -> Stage:
    rows = [{"id": key, "sample": number, "score": value} for (key, number), value in zip(keys, values, strict=True)]
    return write(run, name, rows, SCORE, **inputs)


def planned(run: Run, first: list[float | None], second: list[float | None], rule: Combination, **selectors: list[str]) -> Stage:
    """Golden scores of three samples of two prompts: a: 0, 1, 0; b: 1, 1, 0. Greedy responses: A with 0 and B with 1."""
    texts = [{"prompt": [{"role": "user", "content": k}], "response": f"{k}{n}", "finish_reason": "stop"} for k, n in SAMPLES]
    samples = write(run, "samples", [{"id": k, "sample": n} | t for (k, n), t in zip(SAMPLES, texts, strict=True)], SAMPLE)
    one = [("a", 0), ("b", 0)]
    said = write(run, "greedy-responses", [{"id": key, "sample": 0, "response": key.upper()} for key, _ in one], SAMPLE)
    golden = Golden(
        samples=scores(run, "golden", [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]),
        greedy=scores(run, "greedy", [0.0, 1.0], one, responses=said),
        base=scores(run, "base", [0.0, 0.2], one),
        demonstrations=scores(run, "demonstrations", [1.0, 1.0], one),
    )
    reward = Stage("trained", {})
    (run.directory(reward) / "reward").mkdir(parents=True)
    (run.directory(reward) / "reward/config.json").write_text('{"reward_mean": 2.0, "reward_std": 4.0}')
    rewards = {"x": scores(run, "x", first, reward=reward), "y": scores(run, "y", second, reward=reward)}
    return best_of_n.plan(samples, golden, rewards, selectors, next(iter(selectors)), rule)


def test_the_report_by_hand(tmp_path: Path) -> None:
    run = Run(tmp_path)
    stage = planned(run, [3.0, 2.0, 1.0, 1.0, 2.0, 3.0], [0.0, 9.0, 0.0, 9.0, 8.0, 0.0], Combination(), x=["x"], both=["x", "y"])
    run.do(best_of_n.choose, stage)
    found = json.loads((run.directory(stage) / "report.json").read_text())
    assert (
        found | {"written": {"held_out": {"prompts": 2, "chosen": 2}}} == run.numbers(stage)
        and found["sizes"] == [1, 2, 3]
        and found["prompts"] == 2
        and found["samples"] == 6
    )
    assert found["kl"] == pytest.approx([0, 0.19315, 0.43195], abs=1e-4)
    assert found["golden"] == {"base": 0.1, "demonstrations": 1.0, "greedy": 0.5}
    x, both = found["selectors"]["x"], found["selectors"]["both"]
    # Of two of three, the best by x is in a: 0, 0 or 1 (golden 0, 0, 1), in b: 2, 2 or 1 (0, 0, 1).
    assert x["golden"] == pytest.approx([1 / 2, 1 / 3, 0]) and x["normalised"][0] == pytest.approx(0.4 / 0.9)
    # Against greedy 0 in a: wins where golden is 1; against greedy 1 in b: ties where it is 1.
    assert x["win"] == pytest.approx([1 / 6, 1 / 6, 0]) and x["tie"] == pytest.approx([1 / 3 + 1 / 3, 1 / 3 + 1 / 6, 1 / 2])
    assert both["golden"] == pytest.approx([1 / 2, 5 / 6, 1])
    assert found["selectors"]["oracle (golden)"]["golden"] == pytest.approx([1 / 2, 5 / 6, 1])
    # Of two prompts a band reaches from one to the other: a resample has only one of them in a quarter of the cases each.
    assert x["low"] == pytest.approx([1 / 3, 1 / 3, 0]) and x["high"] == pytest.approx([2 / 3, 1 / 3, 0])
    for line in found["selectors"].values():
        assert all(low <= mean <= high for low, mean, high in zip(line["low"], line["golden"], line["high"], strict=True))
        for normalised, value in {"normalised": "golden", "normalised_low": "low", "normalised_high": "high"}.items():
            assert line[normalised] == pytest.approx([(golden - 0.1) / 0.9 for golden in line[value]])
        assert line["win_rate"] == pytest.approx([win + tie / 2 for win, tie in zip(line["win"], line["tie"], strict=True)])
    assert (run.directory(stage) / "best_of_n.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (run.directory(stage) / "best_of_n.svg").read_text()
    wins, golden = best_of_n_report.tables(found).values()
    assert wins[0] == golden[0] == ["chosen by", "N = 1", "N = 3"]
    assert golden[2] == ["x", "0.44 ± 0.19", "-0.11 ± 0.00"]
    chosen = [json.loads(line) for line in (run.directory(stage) / "chosen.held_out.jsonl").read_text().splitlines()]
    assert [(line["input"][0]["content"], line["output"], line["reward"]) for line in chosen] == [("a", "a0", 3.0), ("b", "b2", 3.0)]
    preferences = [json.loads(line) for line in (run.directory(stage) / "preferences.held_out.jsonl").read_text().splitlines()]
    assert [(line["chosen"][0]["content"], line["rejected"][0]["content"]) for line in preferences] == [("a0", "a2"), ("b2", "b0")]


def test_the_greedy_responses_own_words_tie_with_it_however_the_judge_rounds(tmp_path: Path) -> None:
    run = Run(tmp_path)
    stage = planned(run, [3.0, 2.0, 1.0, 1.0, 2.0, 3.0], [0.0] * 6, Combination(), x=["x"])
    greedy = stage.inputs["greedy"]
    same = [{"id": key, "sample": 0, "response": text} for key, text in (("a", "a0"), ("b", "b2"))]
    write_rows(run.directory(greedy.inputs["responses"]) / "held_out/00000.parquet", same, SAMPLE)
    # The judge read a0 and b2 again, in other company, and differs in the last places: 0 before, 1 and 0 here.
    near = [{"id": key, "sample": 0, "score": value} for key, value in (("a", -1e-7), ("b", 1e-7))]
    write_rows(run.directory(greedy) / "held_out/00000.parquet", near, SCORE)
    run.do(best_of_n.choose, stage)
    x = run.numbers(stage)["selectors"]["x"]
    # By x the best of three are a0 and b2 themselves. Of one: a0 ties, a1 and a2 win; b0 and b1 win, b2 ties.
    assert (x["win"][-1], x["tie"][-1], x["lose"][-1]) == (0, 1, 0)
    assert x["win"][0] == pytest.approx(2 / 3) and x["tie"][0] == pytest.approx(1 / 3)


def ends(run: Run, stage: Stage, **values: list[float]) -> None:
    """Writes other golden scores of the base policy's responses and of the demonstrations, of both prompts."""
    for role, pair in values.items():
        rows = [{"id": key, "sample": 0, "score": value} for key, value in zip("ab", pair, strict=True)]
        write_rows(run.directory(stage.inputs[role]) / "held_out/00000.parquet", rows, SCORE)


def test_demonstrations_below_the_base_policy_turn_the_band_around_not_inside_out(tmp_path: Path) -> None:
    run = Run(tmp_path)
    stage = planned(run, [3.0, 2.0, 1.0, 1.0, 2.0, 3.0], [0.0] * 6, Combination(), x=["x"])
    ends(run, stage, base=[1.0, 1.0], demonstrations=[0.4, 0.6])
    run.do(best_of_n.choose, stage)
    found = run.numbers(stage)
    assert (found["golden"]["base"], found["golden"]["demonstrations"]) == (1.0, 0.5)
    x = found["selectors"]["x"]
    # Golden scores 1/2, 1/3 and 0, from 1/3 to 2/3 the first, on a scale that begins at 1 and has 1/2 as its 1.
    assert x["normalised"] == pytest.approx([1, 4 / 3, 2])
    assert x["normalised_low"] == pytest.approx([2 / 3, 4 / 3, 2]) and x["normalised_high"] == pytest.approx([4 / 3, 4 / 3, 2])
    assert x["normalised_stderr"] == pytest.approx([1 / 3, 0, 0], abs=1e-12)
    assert (run.directory(stage) / "best_of_n.png").exists() and (run.directory(stage) / "best_of_n.svg").exists()


def test_demonstrations_no_better_than_the_base_policy_leave_the_golden_score_as_it_is(tmp_path: Path) -> None:
    run = Run(tmp_path)
    stage = planned(run, [3.0, 2.0, 1.0, 1.0, 2.0, 3.0], [0.0] * 6, Combination(), x=["x"])
    ends(run, stage, base=[0.0, 1.0], demonstrations=[0.5, 0.5])
    run.do(best_of_n.choose, stage)
    found = run.numbers(stage)
    for line in found["selectors"].values():
        assert line["normalised"] is None and not {"normalised_low", "normalised_high", "normalised_stderr"} & set(line)
    assert found["selectors"]["x"]["golden"] == pytest.approx([1 / 2, 1 / 3, 0])
    assert best_of_n_report.tables(found)["golden score"][2] == ["x", "0.50 ± 0.17", "0.00 ± 0.00"]
    assert (run.directory(stage) / "best_of_n.png").exists() and (run.directory(stage) / "best_of_n.svg").exists()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Combination(combine="min"), [("a1", 2.0), ("b1", 2.0)]),
        (Combination(combine="mean_minus_std", k=2.0), [("a0", -1.5), ("b1", -1.0)]),
        (Combination(combine="mean", normalised=True), [("a1", 0.875), ("b0", 0.75)]),
    ],
)
def test_every_rule_chooses_as_by_hand(rule: Combination, expected: list[tuple[str, float]], tmp_path: Path) -> None:
    run = Run(tmp_path)
    stage = planned(run, [3.0, 2.0, 1.0, 1.0, 2.0, 3.0], [0.0, 9.0, -9.0, 9.0, 8.0, 0.0], rule, both=["x", "y"])
    run.do(best_of_n.choose, stage)
    chosen = [json.loads(line) for line in (run.directory(stage) / "chosen.held_out.jsonl").read_text().splitlines()]
    assert [(line["output"], line["reward"]) for line in chosen] == [(name, pytest.approx(value)) for name, value in expected]


def test_a_sample_without_a_score_is_never_chosen_and_never_zero(tmp_path: Path) -> None:
    run = Run(tmp_path)
    stage = planned(run, [3.0, None, -1.0, None, None, None], [0.0] * 6, Combination(), x=["x"], y=["y"])
    run.do(best_of_n.choose, stage)
    found = run.numbers(stage)
    assert found["unscored"] == {"golden": 0, "x": 4, "y": 0} and (found["prompts"], found["samples"]) == (2, 6)
    # x never takes a1, whose golden score is 1; it knows nothing of b, where it chooses at random. Nobody else is touched.
    assert found["selectors"]["x"]["golden"] == pytest.approx([(0 + 2 / 3) / 2] * 3)
    assert found["selectors"]["y"]["golden"] == pytest.approx([1 / 2] * 3) == found["selectors"]["random"]["golden"]
    assert [json.loads(line)["output"] for line in (run.directory(stage) / "chosen.held_out.jsonl").read_text().splitlines()] == ["a0"]
    written = pq.read_table(run.directory(stage) / "samples/held_out/00000.parquet")
    assert written["reward_x"].to_pylist() == [3.0, None, -1.0, None, None, None] and written.num_rows == 6


def test_what_the_judge_failed_on_is_left_out_and_counted(tmp_path: Path) -> None:
    run = Run(tmp_path)
    stage = planned(run, [3.0, 2.0, 1.0, 1.0, 2.0, 3.0], [0.0] * 6, Combination(), x=["x"])
    rows = [{"id": key, "sample": n, "score": {("a", 1): 1.0, ("a", 2): 0.0}.get((key, n))} for key, n in SAMPLES]
    write_rows(run.directory(stage.inputs["golden"]) / "held_out/00000.parquet", rows, SCORE)
    run.do(best_of_n.choose, stage)
    found = run.numbers(stage)
    assert (found["prompts"], found["prompts_left_out"], found["samples"], found["unscored"]["golden"]) == (1, 1, 2, 4)
    assert found["selectors"]["x"]["golden"] == [0.5, 1.0] and found["selectors"]["x"]["stderr"] == [None, None]
    lines = (run.directory(stage) / "chosen.held_out.jsonl").read_text().splitlines()
    assert [json.loads(line)["output"] for line in lines] == ["a0", "b2"], "the choice is the reward model's"


def test_a_prompt_with_fewer_judged_samples_stays_at_what_it_has(tmp_path: Path) -> None:
    run = Run(tmp_path)
    stage = planned(run, [3.0, 2.0, 1.0, 1.0, 2.0, 3.0], [0.0] * 6, Combination(), x=["x"])
    golden = [None, 1.0, 0.0, 1.0, 1.0, 0.0]
    rows = [{"id": key, "sample": n, "score": value} for (key, n), value in zip(SAMPLES, golden, strict=True)]
    write_rows(run.directory(stage.inputs["golden"]) / "held_out/00000.parquet", rows, SCORE)
    run.do(best_of_n.choose, stage)
    found = run.numbers(stage)
    assert (found["sizes"], found["samples"], found["unscored"]["golden"]) == ([1, 2, 3], 5, 1)
    # a: 1/2, then a1 for sure, of two and of "three"; b: 2/3, 1/3, 0 as ever.
    assert found["selectors"]["x"]["golden"] == pytest.approx([7 / 12, 2 / 3, 1 / 2])
    assert found["selectors"]["oracle (golden)"]["golden"] == pytest.approx([7 / 12, 1, 1])


def test_a_cut_or_empty_response_is_no_demonstration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path)
    stage = planned(run, [3.0, 2.0, 1.0, 1.0, 2.0, 3.0], [0.0] * 6, Combination(), x=["x"])
    path = run.directory(stage.inputs["samples"]) / "held_out/00000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["finish_reason"], rows[5]["response"], rows[4]["response"], rows[3]["finish_reason"] = "length", " ", "", "length"
    write_rows(path, rows, SAMPLE)
    run.do(best_of_n.choose, stage)
    lines = (run.directory(stage) / "chosen.held_out.jsonl").read_text().splitlines()
    assert [json.loads(line)["output"] for line in lines] == ["a1"]
    assert (
        run.numbers(stage)["written"] == {"held_out": {"prompts": 2, "chosen": 1}}
        and "1 of 2 held_out prompts have no sample" in caplog.text
    )


def test_equal_scores_prefer_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    stage = planned(run, [0.0, 0.0, 0.0, 1.0, 0.0, 1.0], [0.0] * 6, Combination(), x=["x"])
    run.do(best_of_n.choose, stage)
    (line,) = (run.directory(stage) / "preferences.held_out.jsonl").read_text().splitlines()
    assert [json.loads(line)[side][0]["content"] for side in ("chosen", "rejected")] == ["b0", "b1"]
    assert len((run.directory(stage) / "chosen.held_out.jsonl").read_text().splitlines()) == 2


def test_a_scorer_without_a_centre_decides_alone_or_not_normalised(tmp_path: Path) -> None:
    for selectors in ({"x": ["x"]}, {"both": ["x", "y"]}):
        run = Run(tmp_path / next(iter(selectors)))
        stage = planned(run, [3.0, 2.0, 1.0] * 2, [0.0] * 6, Combination(normalised=True), **selectors)
        stage.inputs["score-x"].inputs.pop("reward")  # type: ignore[attr-defined]
        if "x" in selectors:
            run.do(best_of_n.choose, stage)
            assert json.loads((run.directory(stage) / "chosen.held_out.jsonl").read_text().splitlines()[0])["reward"] == 3.0
        else:
            with pytest.raises(StageError, match="x has no mean and standard deviation to be normalised with"):
                run.do(best_of_n.choose, stage)


def test_without_a_judge_there_are_choices_and_no_report(tmp_path: Path) -> None:
    run = Run(tmp_path)
    judged = planned(run, [3.0, 2.0, 1.0, 1.0, 2.0, 3.0], [0.0] * 6, Combination(), x=["x"])
    scores = {role.removeprefix("score-"): stage for role, stage in judged.inputs.items() if role.startswith("score-")}
    stage = best_of_n.plan(judged.inputs["samples"], None, scores, {"x": ["x"]}, "x", Combination())
    run.do(best_of_n.choose, stage)
    folder = run.directory(stage)
    assert [json.loads(line)["output"] for line in (folder / "chosen.held_out.jsonl").read_text().splitlines()] == ["a0", "b2"]
    assert not (folder / "report.json").exists() and "golden" not in pq.read_table(folder / "samples/held_out/00000.parquet").column_names
