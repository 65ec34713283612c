"""Pairs and their reference: which samples meet which demonstrations, under which policy, by plan and on disk."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from running import rows_of

from actors.learner.batches import Example
from actors.scorer import Scorer
from actors.settings import Objective, Scoring, Training
from jobs import gsil_iterative
from jobs.config import build
from jobs.schemas import GsilConfig
from pipelines import reference
from pipelines.records import DEMONSTRATION, SAMPLE, write_rows
from pipelines.run.artifacts import Run, Stage

PROMPTS = {"a": [0, 10], "b": [0, 11, 12], "c": [0, 13]}
REAL = {"a": [20, 1], "b": [21, 22, 1], "c": [23, 1]}


@pytest.mark.parametrize(("reference_is", "start_is"), [("initial", "previous"), ("previous", "initial")])
def test_the_plan_of_an_iteration(reference_is: str, start_is: str, tiny: Path) -> None:
    flags = ["--iterations.reference", reference_is, "--iterations.start_from", start_is, "--iterations.negatives_window", "2"]
    graph = gsil_iterative.plan(build(GsilConfig, ["--model.path", str(tiny), "--iterations.count", "3", *flags]))
    one, two, three = graph.iterations
    sft, policies = graph.sft.weights, [step.policy.weights for step in graph.iterations]
    assert [step.negatives.inputs["policy"] for step in graph.iterations] == [sft, *policies[:2]]
    windows = [[s for role, s in sorted(step.pairs.inputs.items()) if role.startswith("negatives")] for step in graph.iterations]
    assert windows == [[one.negatives], [one.negatives, two.negatives], [two.negatives, three.negatives]]
    for choice, found in (
        (reference_is, [s.pairs.inputs["reference"] for s in graph.iterations]),
        (start_is, [p.inputs["start"] for p in policies]),
    ):
        assert found == ([sft] * 3 if choice == "initial" else [sft, *policies[:2]])


def stage_with(run: Run, name: str, schema: Any, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> Stage:
    stage = Stage(name, {})
    for split, rows in (("train", train), ("held_out", held_out)):
        (run.directory(stage) / split).mkdir(parents=True)
        write_rows(run.directory(stage) / split / "00000.parquet", rows, schema)
    return stage


def samples(run: Run, iteration: int, cut: int) -> Stage:
    """Two samples a prompt; the second of "b" equals its demonstration, sample `cut` of "a" was cut."""
    rows = []
    for key, prompt in PROMPTS.items():
        for number in range(2):
            same = (key, number) == ("b", 1)
            ids = REAL["b"] if same else [30 + 10 * iteration + number, *([] if (key, number) == ("a", cut) else [1])]
            row = {"id": key, "iteration": iteration, "sample": number, "prompt_ids": prompt, "response_ids": ids}
            rows.append(row | {"finish_reason": "stop" if ids[-1] == 1 else "length"})
    return stage_with(run, f"iteration-{iteration}/negatives", SAMPLE, rows, rows[:4])


@pytest.mark.parametrize("truncated", ["keep", "drop"])
def test_a_window_of_two_with_several_samples(truncated: str, local_ray: None, tiny: Path, tmp_path: Path) -> None:
    run = Run(tmp_path)
    real = [{"id": key, "prompt_ids": ids, "response_ids": REAL[key]} for key, ids in PROMPTS.items()]
    data = stage_with(run, "demonstrations", DEMONSTRATION, real, real)
    negatives = (samples(run, 1, cut=0), samples(run, 2, cut=1))
    policy = Stage("sft/training", {})
    shutil.copytree(tiny, run.directory(policy) / "policy")
    stage = reference.plan("iteration-2/pairs", data, negatives, policy, truncated, Training(), Objective(), Scoring())
    run.do(reference.score(Scoring(), "float32", 512, False), stage)
    drawn = {(t, key, n) for t in (1, 2) for key in PROMPTS for n in range(2)} - {(1, "b", 1), (2, "b", 1)}
    cut = {(1, "a", 0), (2, "a", 1)} if truncated == "drop" else set()
    rows = rows_of(run.directory(stage) / "train")
    assert [(r["iteration"], r["id"], r["sample"]) for r in rows] == sorted(drawn - cut), "each once, in order"
    held_out = {(r["iteration"], r["id"], r["sample"]) for r in rows_of(run.directory(stage) / "held_out")}
    assert held_out == {key for key in drawn - cut if key[0] == 2 and key[1] != "c"}, "of this iteration's negatives alone"
    numbers = run.numbers(stage)
    assert numbers["train"] == {"rows": 10 - len(cut), "identical": 2, "dropped": len(cut)}
    plain = Scorer(str(tiny), Scoring(), "float32")
    for row in rows:
        assert row["prompt_ids"] == PROMPTS[row["id"]] and row["real_ids"] == REAL[row["id"]]
        (want,) = plain([Example("x", row["prompt_ids"], (row["real_ids"], row["generated_ids"]))])
        assert [row["ref_logp_real"], row["ref_logp_generated"]] == pytest.approx(want, abs=1e-3)
