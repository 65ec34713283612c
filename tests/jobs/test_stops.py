"""When the main job stops, what it warns of and which policy it keeps: `align` on stages whose numbers are given."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from jobs.config import build
from jobs.gsil_iterative import align, plan
from jobs.schemas import GsilConfig
from pipelines.means import cut_off
from pipelines.run.artifacts import Run

APART = {"rows": 100, "prompts": 100, "accuracy": 0.8, "reward_real": 0.5, "reward_generated": -0.5, "margin": 1.0}


def finished(root: Path, accuracies: dict[str, float], argv: tuple[str, ...] = (), **numbers: dict[str, Any]) -> dict[str, Any]:
    """The summary of a job all of whose stages were done before.

    Args:
        root: the run directory.
        accuracies: of the policies by name.
        argv: overrides.
        numbers: of "training" or "pairs" of every iteration, instead of the usual.
    """
    config = build(GsilConfig, argv)
    graph, run = plan(config), Run(root)
    usual: dict[str, Any] = {
        "model": {"stop_ids": [1], "context": None, "modules": [], "shares_prompt": True, "window": None},
        "demonstrations": {"train": 10, "held_out": 10, "rejected": 0},
        "pairs": {"train": {"rows": 20, "identical": 2, "dropped": 1}},
        "negatives": {"rows": 13, "truncated": 2},
        "training": {"held_out": APART, "tail_reward_real": 0.5},
    } | numbers

    def give(run: Run, stages: tuple[Any, ...]) -> dict[str, dict[str, Any]]:
        (stage,) = stages
        policy, _, kind = stage.name.rpartition("/")
        (run.directory(stage) / "policy").mkdir()
        (run.directory(stage) / "policy" / "config.json").write_text(json.dumps({"made by": policy}))
        if kind == "model":
            (run.directory(stage) / "tokenizer").mkdir()
            (run.directory(stage) / "tokenizer" / "chat_template.jinja").write_text("the run's")
        return {stage.name: {"accuracy": accuracies.get(policy), "stderr": 0.04, "n": 100} if kind == "evaluation" else usual.get(kind, {})}

    for stage in graph.stages():
        run.do(give, stage)
    return align(config, graph, Run(root))


def kept(root: Path) -> str:
    """Whose weights `final/` are."""
    return json.loads((root / "final/config.json").read_text())["made by"]


def test_all_iterations_and_the_best_policy(tmp_path: Path) -> None:
    summary = finished(tmp_path, {"base": 0.0, "sft": 0.3, "iteration-1": 0.4, "iteration-2": 0.5})
    assert summary["stopped"] is None and summary["final"] == kept(tmp_path) == "iteration-2" and summary["warnings"] == []
    assert list(summary["policies"]) == ["base", "sft", "iteration-1", "iteration-2"]
    assert summary["iterations"][0] == {
        "negatives": 13,
        "truncated": 2,
        "rejected": 3,
        "reward_real": 0.5,
        "reward_generated": -0.5,
        "margin": 1.0,
        "classification_accuracy": 0.8,
        "held_out_pairs": 100,
        "held_out_prompts": 100,
    }


def test_it_stops_when_the_metric_falls_and_keeps_the_best(tmp_path: Path) -> None:
    scores = {"base": 0.0, "sft": 0.3, "iteration-1": 0.25, "iteration-2": 0.28}
    summary = finished(tmp_path / "stops", scores)
    assert summary["stopped"] == "iteration-1: the held-out metric fell"
    assert summary["final"] == kept(tmp_path / "stops") == "sft"
    assert summary["warnings"] == ["iteration-1 is worse than sft: 0.250 after 0.300"]
    assert list(summary["policies"]) == ["base", "sft", "iteration-1"]
    goes_on = finished(tmp_path / "goes_on", scores, ("--iterations.stop_when_worse", "false"))
    assert goes_on["stopped"] is None and goes_on["final"] == kept(tmp_path / "goes_on") == "sft" and len(goes_on["iterations"]) == 2


def test_an_sft_policy_worse_than_the_base_model_is_said_and_mended(tmp_path: Path) -> None:
    summary = finished(tmp_path, {"base": 0.4, "sft": 0.3, "iteration-1": 0.35, "iteration-2": 0.38})
    assert summary["warnings"] == ["sft is worse than base: 0.300 after 0.400; final/ is the best of the trained policies"]
    assert summary["stopped"] is None and summary["final"] == kept(tmp_path) == "iteration-2"


def test_without_sft_the_base_model_is_where_the_iterations_start(tmp_path: Path) -> None:
    argv = ("--sft.epochs", "0", "--iterations.count", "1")
    graph = plan(build(GsilConfig, argv))
    assert graph.sft.weights is graph.base_model and graph.iterations[0].negatives.inputs["policy"] is graph.base_model
    assert "sft/training" not in [stage.name for stage in graph.stages()]
    summary = finished(tmp_path, {"base": 0.3, "sft": 0.3, "iteration-1": 0.2}, argv)
    assert summary["final"] == "sft" and (tmp_path / "final/config.json").exists()
    assert (tmp_path / "final/chat_template.jinja").read_text() == "the run's", "the base model's own folder need not have one"


def test_it_stops_when_held_out_pairs_are_told_apart_by_chance(tmp_path: Path) -> None:
    scores = {"base": 0.0, "sft": 0.3, "iteration-1": 0.4, "iteration-2": 0.5}
    training = {"held_out": APART | {"accuracy": 0.55}, "tail_reward_real": 0.5}
    summary = finished(tmp_path / "stops", scores, training=training)
    assert summary["stopped"] == "iteration-1: held-out pairs are told apart no better than by chance (0.550)"
    assert summary["final"] == kept(tmp_path / "stops") == "iteration-1"
    goes_on = finished(tmp_path / "goes_on", scores, ("--iterations.stop_when_indistinguishable", "false"), training=training)
    assert goes_on["stopped"] is None and goes_on["final"] == "iteration-2"


def test_it_stops_when_no_pair_is_left(tmp_path: Path) -> None:
    summary = finished(tmp_path, {"base": 0.0, "sft": 0.3}, pairs={"train": {"rows": 0, "identical": 10}})
    assert "every sample equals its demonstration" in summary["stopped"] and summary["iterations"] == []


def test_without_a_metric_the_last_policy_is_final(tmp_path: Path) -> None:
    argv = ("--evaluation.metric", "none", "--iterations.stop_when_worse", "false")
    assert finished(tmp_path, {}, argv)["final"] == "iteration-2"


def test_many_cut_responses_are_warned_of_where_a_run_is_read_and_in_the_words_of_the_report(tmp_path: Path) -> None:
    summary = finished(tmp_path, {}, samples={"rows": 100, "truncated": 50}, negatives={"rows": 10, "truncated": 3})
    told = [cut_off("sft/samples", 0.5), cut_off("iteration-1/negatives", 0.3), cut_off("iteration-1/samples", 0.5)]
    assert [text for text in summary["warnings"] if "iteration-2" not in text] == told


@pytest.mark.parametrize(("gamma", "text"), [("0", "stays below zero (-0.600)"), ("1", "heads for -gamma (-0.600 of -1)")])
def test_a_falling_reward_is_in_the_log_the_summary_and_on_the_model_card(
    gamma: str, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        summary = finished(tmp_path, {}, ("--objective.gamma", gamma), training={"held_out": APART, "tail_reward_real": -0.6})
    assert [text in record.getMessage() for record in caplog.records] == [True, True]
    assert [text in warning for warning in summary["warnings"]] == [True, True]
    assert text in (tmp_path / "final" / "README.md").read_text()
