"""The whole job with the real Ray, vLLM and DeepSpeed on a tiny random model: files, resume, refusal, leftovers."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from running import ROOT, command, content, finish, rows_of, start, stop_when, wait_until_gone
from safetensors import safe_open
from transformers import AutoTokenizer

STAGES = [
    "base/model",
    "demonstrations",
    "base/samples",
    "base/evaluation",
    "sft/training",
    "sft/samples",
    "iteration-1/negatives",
    "sft/evaluation",
    "iteration-1/pairs",
    "iteration-1/training",
    "iteration-1/samples",
    "iteration-1/evaluation",
]


def test_the_run_directory(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert set(summary["policies"]) == {"base", "sft", "iteration-1"}
    for numbers in summary["policies"].values():
        assert set(numbers) == {"accuracy", "stderr", "n"} and numbers["n"] == summary["demonstrations"]["held_out"]
    assert [stage["name"] for stage in summary["stages"]] == STAGES
    assert all(set(stage) == {"name", "seconds", "skipped", "fingerprint"} for stage in summary["stages"])
    assert summary["run"] == "job" and summary["total_seconds"] == pytest.approx(sum(stage["seconds"] for stage in summary["stages"]))
    assert yaml.safe_load((undisturbed / "config.yaml").read_text())["training"]["learning_rate"] == 1e-3
    assert all(not stage["skipped"] for stage in summary["stages"])
    (iteration,) = summary["iterations"]
    assert {"negatives", "truncated", "rejected", "reward_real", "reward_generated", "margin", "classification_accuracy"} <= set(iteration)
    rhos = pq.read_table(undisturbed / "iteration-1/training/held_out.parquet").to_pandas()
    beta = yaml.safe_load((undisturbed / "config.yaml").read_text())["objective"]["beta"]
    real, generated = beta * rhos["rho_real"], beta * rhos["rho_generated"]
    assert iteration["classification_accuracy"] == pytest.approx((real > generated).mean()) and len(rhos) > 4
    expected = [real.mean(), generated.mean(), (real - generated).mean()]
    assert [iteration[name] for name in ("reward_real", "reward_generated", "margin")] == pytest.approx(expected, abs=1e-5)
    assert summary["demonstrations"]["train"] + summary["demonstrations"]["held_out"] == 40
    assert summary["demonstrations"]["rejected"] == 1
    (rejected,) = pq.read_table(undisturbed / "demonstrations" / "rejected.parquet").to_pylist()
    assert rejected["source"] == "rows.jsonl:8" and "broken JSON" in rejected["reason"]
    page = (undisturbed / "report.html").read_text()
    assert f"ended: {len(STAGES)} of {len(STAGES)} stages" in page and page.count('class="card"') == min(
        10, summary["demonstrations"]["held_out"]
    )
    assert all(f'aria-label="{figure}"' in page for figure in ("training", "sft", "lengths"))
    for name in STAGES:
        assert json.loads((undisturbed / name / "manifest.json").read_text())["name"] == name
    assert list(undisturbed.glob("sft/training/events.out.tfevents.*"))
    assert not [*undisturbed.rglob(".*.rows"), *undisturbed.rglob("*.tmp")]
    card = (undisturbed / "final" / "README.md").read_text()
    assert "base_model:" not in card, "a local directory is no name on the hub"
    assert all(word in card for word in ("gsil_logistic", "rows.jsonl", "learning_rate", "vllm", "transformers", "iteration-1")), card
    weights = [
        (undisturbed / name).read_bytes() for name in ("final/model.safetensors", f"{summary['final']}/training/policy/model.safetensors")
    ]
    assert weights[0] == weights[1]
    policy = undisturbed / "iteration-1/training/policy"
    assert json.loads((policy / "config.json").read_text())["dtype"] == "float32"
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in policy.iterdir()), "others can read it"
    log = (undisturbed / "logs" / "job.log").read_text()
    assert all(f"done: {name}," in log for name in STAGES)


def assert_same_ids(run: Path, end: int, limit: int) -> set[str]:
    """The ids of demonstrations, samples and pairs of the first iteration are the same; returns how samples ended."""
    reasons = set()
    for split in ("train", "held_out"):
        real = {row["id"]: row for row in rows_of(run / "demonstrations" / split)}
        samples = rows_of(run / "iteration-1/negatives" / split)
        assert [s["id"] for s in samples] == list(real)[: len(samples)], "one sample a prompt, in order"
        drawn = {s["id"]: s for s in samples}
        for pair in rows_of(run / "iteration-1/pairs" / split):
            assert pair["prompt_ids"] == real[pair["id"]]["prompt_ids"] == drawn[pair["id"]]["prompt_ids"]
            assert pair["real_ids"] == real[pair["id"]]["response_ids"]
            assert pair["generated_ids"] == drawn[pair["id"]]["response_ids"]
        for sample in samples:
            ids, stopped = sample["response_ids"], sample["finish_reason"] == "stop"
            assert (ids.count(end), ids[-1] == end) == ((1, True) if stopped else (0, False))
            assert len(ids) == limit or stopped
            reasons.add(sample["finish_reason"])
            assert set(sample) >= {"id", "iteration", "prompt", "response", "prompt_ids", "response_ids", "finish_reason"}
            assert sample["iteration"] == 1 and sample["prompt"][-1]["role"] == "user"
    return reasons


def test_the_ids_that_were_sampled_scored_and_trained_on_are_the_same(undisturbed: Path) -> None:
    assert assert_same_ids(undisturbed, end=1, limit=24) == {"stop", "length"}
    for path in ("demonstrations/train", "demonstrations/held_out", "iteration-1/negatives/train"):
        assert all(row["prompt_ids"].count(0) == 1 and row["prompt_ids"][0] == 0 for row in rows_of(undisturbed / path))


@pytest.mark.slow
def test_so_are_smollm2s(tmp_path: Path) -> None:
    sizes = {"demonstrations.limit": 48, "demonstrations.held_out_limit": 8, "sft.epochs": 2, "iterations.count": 1}
    options = {"run.name": "job", "run.root": tmp_path, "ray.num_cpus": 2, "negatives.max_new_tokens": 48, "evaluation.max_new_tokens": 48}
    flags = [part for key, value in (sizes | options).items() for part in (f"--{key}", str(value))]
    done = finish([sys.executable, "jobs/gsil_iterative.py", "--config", "jobs/configs/quickstart.yaml", *flags])
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "job"
    assert assert_same_ids(run, end=2, limit=48) == {"stop", "length"}
    for policy in (run / "base/model/policy", run / "sft/training/policy"):
        with safe_open(policy / "model.safetensors", "pt") as weights:
            assert "lm_head.weight" not in weights.keys(), "tied to the embeddings, and once on disk"  # noqa: SIM118
        assert all(path.stat().st_mode & 0o044 == 0o044 for path in policy.iterdir()), "others can read it"
    tokenizer = AutoTokenizer.from_pretrained(run / "sft/training/policy")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    for row in rows_of(run / "iteration-1/negatives/train"):
        assert row["prompt_ids"] == tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        # Its template begins every turn with the token that is its BOS: system, user, assistant.
        assert row["prompt_ids"].count(1) == 3 and row["prompt_ids"][0] == 1 != row["prompt_ids"][1]


def test_the_first_step_of_the_iteration_starts_at_the_reference(undisturbed: Path) -> None:
    first = json.loads((undisturbed / "iteration-1/training/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(1.3862944, abs=1e-4)
    assert first["reward_real"] == pytest.approx(0, abs=1e-4)


def test_a_second_run_of_a_finished_job_does_nothing_again(undisturbed: Path, tiny: Path, demonstrations: Path) -> None:
    before = content(undisturbed)
    started = time.monotonic()
    done = finish(command(tiny, demonstrations, undisturbed.parent))
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 30
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert all(stage["skipped"] for stage in summary["stages"]) and content(undisturbed) == before
    planned = finish(command(tiny, demonstrations, undisturbed.parent, "--dry-run")).stdout
    assert planned.count("  done ") == len(STAGES) and "to do" not in planned
    assert "learning_rate: 0.001" in planned and "1 x (1 CPU, 0 GPU), ZeRO-1" in planned
    planned = finish(command(tiny, demonstrations, undisturbed.parent, "--dry-run", "--objective.beta", "0.2")).stdout
    fingerprints = {stage["name"]: stage["fingerprint"] for stage in summary["stages"]}
    states = {line.split("to do")[1].split()[0]: line.split()[0] for line in planned.splitlines() if "to do" in line}
    assert list(states) == STAGES[9:] and all(fingerprints[name] != mark for name, mark in states.items())
    assert all(f"{fingerprints[name]}  done   {name} " in planned for name in STAGES[:9])


def test_a_mistake_costs_a_finished_run_nothing(undisturbed: Path, tiny: Path, demonstrations: Path, tmp_path: Path) -> None:
    run = shutil.copytree(undisturbed, tmp_path / "job")
    kept = [path for path in run.iterdir() if path.suffix in (".json", ".yaml", ".html", ".md") and path.name != "progress.json"]
    before = {path.name: path.read_bytes() for path in kept}
    assert {"summary.json", "config.yaml", "plan.json", "report.html", "report.md"} <= set(before)
    done = finish(command(tiny, demonstrations, tmp_path, "--training.lora_r", "4", "--training.lora_targets", "nothing_here"))
    assert done.returncode == 1 and "'nothing_here' matches no module" in done.stderr
    assert {path.name: path.read_bytes() for path in kept} == before
    # What really begins again is told as such.
    process = start(command(tiny, demonstrations, tmp_path, "--objective.beta", "0.3"), tmp_path)
    stop_when(process, (run / "iteration-1/training/started.json").exists, signal.SIGINT)
    assert not (run / "summary.json").exists() and "beta: 0.3" in (run / "config.yaml").read_text()
    assert "interrupted" in (run / "report.md").read_text()
    wait_until_gone(tmp_path)


IN_GENERATION = "sft/samples, one of its shards"
WITH_MODELS = [IN_GENERATION, "iteration-1/training"]
BEFORE = STAGES[:5]
"""what is done before the first of these moments, and would take a minute each time"""
OF_A_MOMENT = {"demonstrations", *(f"{policy}/evaluation" for policy in ("base", "sft", "iteration-1"))}
THE_OTHERS = [name for name in STAGES if name not in WITH_MODELS]


@pytest.mark.parametrize("behind", [WITH_MODELS, pytest.param(THE_OTHERS, marks=pytest.mark.slow)], ids=["with models", "the others"])
def test_killed_after_every_stage_and_within_generation_it_ends_with_the_same_files(
    behind: list[str], undisturbed: Path, tiny: Path, demonstrations: Path, tmp_path: Path
) -> None:
    argv, run = command(tiny, demonstrations, tmp_path), tmp_path / "job"
    if behind is WITH_MODELS:
        for name in BEFORE:
            shutil.copytree(undisturbed / name, run / name)
    first_shards: dict[Path, int] = {}
    finished: dict[Path, bytes] = {}
    missed: list[str] = []

    def reached(moment: str) -> bool:
        return any((run / "sft/samples").glob("*/*.parquet")) if moment == IN_GENERATION else (run / moment / "manifest.json").exists()

    for moment in behind:
        if reached(moment):
            missed.append(moment)
            continue
        process = start(argv, tmp_path)
        stop_when(process, functools.partial(reached, moment), signal.SIGKILL)
        wait_until_gone(tmp_path)
        finished |= {path: path.read_bytes() for path in run.rglob("manifest.json")}
        if moment == IN_GENERATION:
            first_shards = {p: p.stat().st_mtime_ns for p in (run / "sft/samples").glob("*/*.parquet")}
            assert first_shards and not (run / "sft/samples/manifest.json").exists()
    done = finish(argv)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(path.stat().st_mtime_ns == made for path, made in first_shards.items()), "finished shards were made again"
    # They may end within the half second in which the one before was killed.
    assert len(missed) <= 2 and set(missed) <= OF_A_MOMENT
    assert all(path.read_bytes() == made for path, made in finished.items()), "finished stages ran again"
    assert content(run) == content(undisturbed)
    numbers = [json.loads((root / "summary.json").read_text()) for root in (run, undisturbed)]
    for key in ("policies", "iterations", "final", "demonstrations"):
        assert numbers[0][key] == numbers[1][key]


def test_ctrl_c_leaves_nothing_behind_and_says_how_to_go_on(tiny: Path, demonstrations: Path, tmp_path: Path) -> None:
    argv = command(tiny, demonstrations, tmp_path)
    # In a group of its own, all of which gets the signal, as from a terminal.
    environment = os.environ | {"GSIL_TEST": str(tmp_path)}
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "job/base/samples/started.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(3)
    second = finish(argv)
    assert second.returncode == 1 and "in use by another process" in second.stderr
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in errors
    wait_until_gone(tmp_path)


@pytest.mark.slow
def test_a_window_of_two_an_initial_reference_and_several_samples(
    undisturbed: Path, tiny: Path, demonstrations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "job"
    shutil.copytree(undisturbed, run)
    options = ["--iterations.negatives_window", "2", "--iterations.reference", "initial", "--iterations.start_from", "initial"]
    options += ["--negatives.samples", "2", "--iterations.stop_when_indistinguishable", "false"]
    done = finish(command(tiny, demonstrations, tmp_path, *options, "--iterations.count", "2"))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert [s["name"] for s in summary["stages"] if s["skipped"]] == [n for n in STAGES if not n.startswith("iteration")]
    for split, iterations in (("train", (1, 2)), ("held_out", (2,))):
        real = {row["id"]: row["response_ids"] for row in rows_of(run / "demonstrations" / split)}
        drawn = [row for t in iterations for row in rows_of(run / f"iteration-{t}/negatives" / split)]
        assert len(drawn) == 2 * len(real) * len(iterations)
        kept = {(row["id"], row["iteration"], row["sample"]) for row in drawn if row["response_ids"] != real[row["id"]]}
        pairs = rows_of(run / "iteration-2/pairs" / split)
        assert {(row["id"], row["iteration"], row["sample"]) for row in pairs} == kept and len(pairs) == len(kept)
    # Both iterations start from SFT and refer to it: the same pair has the same reference, the first step is at zero.
    references = [
        {(r["id"], r["sample"]): r["ref_logp_generated"] for r in rows_of(run / f"iteration-{t}/pairs/train") if r["iteration"] == 1}
        for t in (1, 2)
    ]
    assert references[0] and references[0] == pytest.approx(references[1], abs=1e-3)
    for t in (1, 2):
        first = json.loads((run / f"iteration-{t}/training/metrics.jsonl").read_text().splitlines()[0])
        assert first["reward_real"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_cut_samples_are_dropped(undisturbed: Path, tiny: Path, demonstrations: Path, tmp_path: Path) -> None:
    run = tmp_path / "job"
    shutil.copytree(undisturbed, run)
    done = finish(command(tiny, demonstrations, tmp_path, "--negatives.samples", "2", "--negatives.truncated", "drop"))
    assert done.returncode == 0, done.stdout + done.stderr
    samples = rows_of(run / "iteration-1/negatives/train")
    stopped = {(row["id"], row["sample"]) for row in samples if row["finish_reason"] == "stop"}
    assert {(row["id"], row["sample"]) for row in rows_of(run / "iteration-1/pairs/train")} == stopped
    (numbers,) = json.loads((run / "summary.json").read_text())["iterations"]
    assert numbers["rejected"] == len(samples) - len(stopped) > 0


# From a terminal, where the whole group gets it, and as `ray job stop` and Slurm send it.
@pytest.mark.slow
@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_training_stops_at_once_too(
    name: signal.Signals, undisturbed: Path, tiny: Path, demonstrations: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "job")
    shutil.rmtree(tmp_path / "job/iteration-1/training")
    argv = command(tiny, demonstrations, tmp_path, "--training.learning_rate", "2e-3", "--training.epochs", "500")
    environment = os.environ | {"GSIL_TEST": str(tmp_path)}
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "job/iteration-1/training/metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    (os.killpg if name == signal.SIGINT else os.kill)(process.pid, name)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command continues" in errors and "Traceback" not in errors
    wait_until_gone(tmp_path)


@pytest.mark.slow
def test_a_prompt_that_cannot_fit_the_model_is_refused_before_an_engine_starts(tiny: Path, demonstrations: Path, tmp_path: Path) -> None:
    done = finish(command(tiny, demonstrations, tmp_path, "--negatives.max_new_tokens", "500"))
    assert done.returncode == 1 and not (tmp_path / "job" / "base" / "samples").exists()
    assert "demonstrations.max_prompt_tokens + negatives.max_new_tokens = 596 tokens, but the context of the model is 512" in done.stderr
    assert "Traceback" not in done.stderr
