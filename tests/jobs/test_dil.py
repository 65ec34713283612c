"""Preference pairs: the two sides of a row in every layout, and `jobs/dil.py` as a whole on a tiny model."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from running import finish, rows_of
from training import train, write_pairs

from actors.presets import PRESETS
from actors.settings import Objective
from jobs import dil as job
from jobs.config import ConfigError, build
from jobs.schemas import DilConfig, GsilConfig
from pipelines.data.layouts import RowError, detect, rejected, turns
from pipelines.records import DEMONSTRATION, write_rows
from pipelines.reference import mismatched
from pipelines.run.artifacts import Run, Stage, StageError

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "Hi?"), ("assistant", "Hello!"), ("assistant", "Go away.")))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "Hello!", "rejected": "Go away."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi?\n\nAssistant: Go away."},
        {"real": [USER, GOOD], "generated": [USER, BAD]},
    ],
)
def test_both_sides_of_a_pair(row: dict[str, Any]) -> None:
    layout = detect(row)
    assert layout
    assert turns(row, layout) == ([USER], "Hello!") and rejected(row, layout) == "Go away."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi?", "chosen": "Hello!"}, "'rejected' is missing"),
        ({"prompt": "Hi?", "chosen": "Hello!", "rejected": " "}, "'rejected' cannot be read: the response is empty"),
        ({"prompt": "Hi?", "chosen": "Hello!", "rejected": "Hello! "}, "are equal"),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "Ho?"}, BAD]}, "answer different prompts"),
        ({"question": "Hi?", "answer": "Hello!"}, "one response a row: pairs need preference, hh, spin"),
    ],
)
def test_a_row_that_is_no_pair_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        rejected(row, detect(row) or "")


def test_the_config_keeps_its_own_defaults_beside_what_is_given() -> None:
    config = build(DilConfig, ["--demonstrations.path", "pairs.jsonl", "--objective.beta", "0.5", "--evaluation.max_new_tokens", "9"])
    assert (config.objective.name, config.objective.beta, config.objective.length_normalised) == ("dil_lsif", 0.5, True)
    assert config.evaluation.metric == "none" and config.run.name == "dil"
    other = build(DilConfig, ["--demonstrations.path", "pairs.jsonl", "--objective.name", "dpo", "--run.root", "elsewhere"])
    assert (other.objective.beta, other.objective.length_normalised, other.run.name) == (0.1, False, "dil")
    with pytest.raises(ConfigError, match=r"demonstrations\.path must name preference pairs"):
        build(DilConfig, [])
    with pytest.raises(ConfigError, match=r"objective\.name='dil_lsiv'.*dil_lsif"):
        build(DilConfig, ["--objective.name", "dil_lsiv"])


def test_a_mismatched_response_is_one_to_another_prompt() -> None:
    rows = [{"prompt_ids": [prompt], "real_ids": [prompt, 1], "generated_ids": [prompt, 2 + k]} for k, prompt in enumerate([7, 7, 8, 9, 9])]
    found, alone = mismatched(rows)
    assert alone == 0 and [row["mismatched_ids"] for row in found] == [[8, 1], [8, 4], [9, 1], [7, 2], [7, 1]]
    assert mismatched(rows[:2]) == ([], 2) and mismatched([]) == ([], 0)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_objective_trains(name: str, tiny: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tiny, tmp_path / "pairs.parquet")
    steps = train(tiny, pairs, tmp_path / "out", 1, Objective(name=name), epochs=4)
    assert all(math.isfinite(value) for step in steps for value in step.values())
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HH text: 40 good pairs, and one of equal sides."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    sides = [(f"{i} + {i + 1} = {2 * i + 1}\n#### {2 * i + 1}", f"maybe {3 * i + 5}") for i in range(40)] + [("same", "same")]
    rows = []
    for i, (good, bad) in enumerate(sides):
        start = f"\n\nHuman: What is {i} and {i + 1}?\n\nAssistant: "
        rows.append(json.dumps({"chosen": start + good, "rejected": start + bad}))
    path.write_text("\n".join(rows) + "\n")
    return path


def dil(model: Path, data: Path, root: Path, *extra: str) -> list[str]:
    """The flags of a small job."""
    options = {
        "run.root": root,
        "ray.num_cpus": 2,
        "model.path": model,
        "demonstrations.path": data,
        "demonstrations.max_rejected_fraction": 0.1,
        "demonstrations.held_out_fraction": 0.3,
        "demonstrations.max_prompt_tokens": 96,
        "demonstrations.max_tokens": 160,
        "demonstrations.shard_rows": 16,
        "sft.epochs": 1,
        "training.workers": 2,
        "training.learning_rate": 1e-3,
        "evaluation.max_new_tokens": 8,
        "engine.num_cpus": 2,
        "engine.kv_cache_gib": 0.1,
    }
    return [*(part for key, value in options.items() for part in (f"--{key}", str(value))), *extra]


SCRIPT = [sys.executable, "jobs/dil.py"]


def test_the_job_on_preference_pairs(tiny: Path, preferences: Path, tmp_path: Path) -> None:
    run = tmp_path / "dil"
    # It starts at once: how the main job samples with vLLM is looked at elsewhere.
    done = finish([*SCRIPT, *dil(tiny, preferences, tmp_path, "--engine.backend", "transformers")])
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["policies"]) == {"base", "dil"} and summary["final"] == "dil"
    (numbers,) = summary["iterations"]
    assert numbers["negatives"] == summary["demonstrations"]["train"] and 0 <= numbers["classification_accuracy"] <= 1
    (bad,) = pq.read_table(run / "demonstrations/rejected.parquet").to_pylist()
    assert bad["source"] == "pairs.jsonl:41" and "are equal" in bad["reason"]
    rows = {row["id"]: row for row in rows_of(run / "demonstrations/train")}
    pairs = rows_of(run / "dil/pairs/train")
    assert [pair["id"] for pair in pairs] == list(rows)
    for pair in pairs:
        row = rows[pair["id"]]
        assert (pair["real_ids"], pair["generated_ids"]) == (row["response_ids"], row["rejected_ids"]) and row["rejected_ids"][-1] == 1
    steps = [json.loads(line) for line in (run / "dil/training/metrics.jsonl").read_text().splitlines()]
    assert steps[0]["loss"] == pytest.approx(-0.5, abs=1e-3), "-exp(0) + exp(0) / 2 at the reference"


def test_pairs_without_answers_stop_the_job_before_anything_is_trained(preferences: Path, tmp_path: Path) -> None:
    config = build(DilConfig, ["--demonstrations.path", str(preferences), "--evaluation.metric", "exact_answer"])
    graph, run = job.plan(config), Run(tmp_path)
    usual = {"stop_ids": [1], "context": None, "modules": [], "shares_prompt": True, "window": None}

    def give(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        (run.directory(stages[0]) / "made").touch()
        if stages[0] is graph.demonstrations:
            for split in ("train", "held_out"):
                (run.directory(stages[0]) / split).mkdir()
                write_rows(run.directory(stages[0]) / split / "00000.parquet", [{"id": "a", "response": "so 3"}], DEMONSTRATION)
        return {stages[0].name: usual if stages[0] is graph.base_model else {}}

    for stage in graph.stages():
        run.do(give, stage)
    said = r"^evaluation\.metric=exact_answer, but no demonstration \(train\) has a number after '####': set evaluation\.metric=none$"
    with pytest.raises(StageError, match=said):
        job.align(config, graph, Run(tmp_path))


@pytest.mark.slow
def test_kto_wants_a_third_response_so_its_pairs_are_made_anew(tiny: Path, preferences: Path, tmp_path: Path) -> None:
    run = tmp_path / "dil"
    first = dil(tiny, preferences, tmp_path)
    for extra in ((), ("--objective.name", "kto")):
        done = finish([*SCRIPT, *first, *extra])
        assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((run / "summary.json").read_text())["stages"]
    assert {stage["name"] for stage in stages if not stage["skipped"]} == {"dil/pairs", "dil/training"}
    assert {p["mismatched_ids"] is None for p in pq.read_table(next((run / "dil/pairs/train").glob("*"))).to_pylist()} == {False}


@pytest.mark.slow
def test_targets_that_match_nothing_stop_the_job_before_a_model_loads(tiny: Path, preferences: Path, tmp_path: Path) -> None:
    done = finish(SCRIPT + dil(tiny, preferences, tmp_path, "--training.lora_r", "4", "--training.lora_targets", "q_proj,wqkv"))
    assert done.returncode == 1 and not (tmp_path / "dil/demonstrations").exists()
    assert "training.lora_targets: 'wqkv' matches no module of the model; it has down_proj, gate_proj, k_proj" in done.stderr


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """One local Ray for many jobs."""
    from pipelines.settings import RaySettings
    from pipelines.workers.cluster import connected

    with connected(RaySettings(num_cpus=2)):
        yield


@pytest.mark.slow
def test_the_policies_of_the_job_are_evaluated(tiny: Path, preferences: Path, tmp_path: Path) -> None:
    done = finish(SCRIPT + dil(tiny, preferences, tmp_path, "--demonstrations.sft_first", "true", "--evaluation.metric", "exact_answer"))
    assert done.returncode == 0, done.stdout + done.stderr
    policies = json.loads((tmp_path / "dil/summary.json").read_text())["policies"]
    assert set(policies) == {"base", "sft", "dil"} and all(numbers["n"] > 0 for numbers in policies.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_from_data_to_policy(
    name: str, one_ray: None, tiny: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.getbasetemp() / "presets"
    config = build(DilConfig, dil(tiny, preferences, root, "--objective.name", name))
    summary = job.align(config, job.plan(config), Run(root / "dil"))
    # SFT sees the chosen side alone: it tells nothing apart.
    assert (summary["iterations"][0]["held_out_pairs"] > 0) == (name != "sft")
    assert (root / "dil/final/model.safetensors").exists()


def test_gsil_takes_every_preset_too() -> None:
    assert {build(GsilConfig, ["--objective.name", name]).objective.name for name in PRESETS} == set(PRESETS)
