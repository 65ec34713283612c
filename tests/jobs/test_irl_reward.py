"""`jobs/irl_reward.py` as a whole on a tiny model: from the SFT policy of the main job to reward models and the best of N."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import command, content, finish, rows_of, start, stop_when, wait_until_gone
from transformers import AutoTokenizer
from vllm_server import served

from actors.learner.batches import Example
from actors.scorer import Scorer
from actors.settings import Engine, Scoring
from pipelines.best_of_n import choose_from
from pipelines.data.layouts import detect, rejected, turns
from pipelines.run.artifacts import StageError
from pipelines.settings import BestOfN, Demonstrations

# The whole job beside the main job's: the quick suite has its parts in test_reward_training, test_scoring, test_choice and test_rewards.
pytestmark = pytest.mark.slow
SHARED_SECTIONS = ("run", "ray", "model", "demonstrations", "sft", "training", "engine")
FIRST = "rewards/init-sft/seed-0/trained.json"
JUDGE = (
    "def brevity(messages, response):\n    return -float(len(response))\n\n"
    "def length(messages, response):\n    return float(len(response))\n"
)


def irl_command(model: Path, data: Path, root: Path, *extra: str) -> list[str]:
    """The main job's options, as far as both jobs have them."""
    options = command(model, data, root)[2:]
    shared = [
        word
        for flag, value in zip(options[::2], options[1::2], strict=True)
        if flag[2:].partition(".")[0] in SHARED_SECTIONS
        for word in (flag, value)
    ]
    own = {
        "rewards.kinds": "[init-sft, bt]",
        "rewards.ensemble": "[init-sft, bt]",
        "rewards.combine": "min",
        "rewards.normalised": "true",
        "responses.samples": "2",
        "responses.max_new_tokens": "24",
        "training.lora_r": "4",
        "best_of_n.n": "6",
        "best_of_n.max_new_tokens": "24",
        "best_of_n.golden": "judge_of_tests:brevity",
        "best_of_n.train_prompts": "4",
    }
    return [sys.executable, "jobs/irl_reward.py", *shared, *(w for key, value in own.items() for w in (f"--{key}", value)), *extra]


@pytest.fixture(scope="module")
def finished(undisturbed: Path, tiny: Path, demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in the directory of the main job, killed once while a reward model is trained."""
    root = tmp_path_factory.mktemp("irl")
    (root / "judge_of_tests.py").write_text(JUDGE)
    shutil.copytree(undisturbed, root / "job")
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(root))
    argv = irl_command(tiny, demonstrations, root)
    process = start(argv, root)
    stop_when(process, (root / "job/rewards/bt/seed-0/metrics.jsonl").exists, signal.SIGKILL)
    wait_until_gone(root)
    (root / "trained before").write_text(str((root / "job" / FIRST).stat().st_mtime_ns))
    done = finish(argv)
    patch.undo()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reward models on held-out pairs" in done.stdout and "best of N on" in done.stdout
    return root / "job"


def test_it_goes_on_from_the_main_jobs_policy_and_from_where_it_was_killed(finished: Path, undisturbed: Path) -> None:
    summary = json.loads((finished / "reward-summary.json").read_text())
    skipped = {stage["name"] for stage in summary["stages"] if stage["skipped"]}
    assert {"sft/training", "base/responses"} <= skipped
    # One gang trains all reward models: what it had done stays.
    assert str((finished / FIRST).stat().st_mtime_ns) == (finished.parent / "trained before").read_text()
    assert not skipped & {"rewards/bt/seed-0", "best_of_n/golden", "best_of_n/results"}
    for name in ("summary.json", "config.yaml"):
        assert (finished / name).read_bytes() == (undisturbed / name).read_bytes(), "the main job's own"
    # Trained again it would have the same content, and another time of day.
    assert (finished / "sft/training/manifest.json").read_bytes() == (undisturbed / "sft/training/manifest.json").read_bytes()
    before = content(undisturbed)
    assert {name: made for name, made in content(finished).items() if name in before} == before
    assert set(summary["rewards"]) == {"init-sft-0", "bt-0"} and summary["rewards"]["bt-0"]["accuracy"] is None


def test_a_second_run_does_nothing_again(finished: Path, tiny: Path, demonstrations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(finished.parent))
    planned = finish(irl_command(tiny, demonstrations, finished.parent, "--dry-run"), env=os.environ).stdout
    assert "to do" not in planned and planned.count("  done ") == 21


def test_samples_of_both_sides_are_paired(finished: Path) -> None:
    above, below = (
        {(r["id"], r["sample"]): r["response_ids"] for r in rows_of(finished / policy / "responses/train")} for policy in ("sft", "base")
    )
    pairs = rows_of(finished / "rewards/init-sft/pairs/train")
    assert {(r["id"], r["sample"]): r["real_ids"] for r in pairs}.items() <= above.items()
    assert {(r["id"], r["sample"]): r["generated_ids"] for r in pairs}.items() <= below.items()
    lengths = {tuple(r["response_ids"]): len(r["response"]) for r in rows_of(finished / "sft/responses/train")}
    made = rows_of(finished / "rewards/bt/pairs/train")
    assert made and all(lengths[tuple(r["real_ids"])] < lengths[tuple(r["generated_ids"])] for r in made), "the judge likes them short"


def test_the_centre_of_the_reward_is_in_the_models_config(finished: Path) -> None:
    directory = finished / "rewards/init-sft/seed-0/reward"
    config = json.loads((directory / "config.json").read_text())
    held_out = rows_of(finished / "sft/responses/held_out")
    scorer = Scorer(str(directory), Scoring(), "float32", kind="reward")
    rewards = [value for row in scorer([Example(r["id"], r["prompt_ids"], (r["response_ids"],)) for r in held_out]) for value in row]
    assert config["reward_mean"] == pytest.approx(np.mean(rewards), abs=1e-4)
    assert config["reward_std"] == pytest.approx(np.std(rewards), abs=1e-4) and config["reward_std"] > 0
    assert (finished / "rewards/init-sft/seed-0/adapter/adapter_config.json").exists()


def test_all_scores_are_written_and_the_best_chosen(finished: Path) -> None:
    folder = finished / "best_of_n/results"
    centres = {}
    for kind in ("init-sft", "bt"):
        config = json.loads((finished / f"rewards/{kind}/seed-0/reward/config.json").read_text())
        centres[f"reward_{kind}-0"] = config["reward_mean"], config["reward_std"]
    for split, prompts in (("held_out", len(rows_of(finished / "demonstrations/held_out"))), ("train", 4)):
        samples = rows_of(folder / "samples" / split)
        assert len(samples) == 6 * prompts
        assert all(row["golden"] == -len(row["response"]) for row in samples)
        best: dict[str, tuple[dict[str, Any], float]] = {}
        for row in samples:
            least = min((row[key] - mean) / std for key, (mean, std) in centres.items())
            whole = row["finish_reason"] == "stop" and row["response"].strip()
            if whole and least > best.get(row["id"], ({}, -np.inf))[1]:
                best[row["id"]] = row, least
        lines = [json.loads(line) for line in (folder / f"chosen.{split}.jsonl").read_text().splitlines()]
        assert [(line["input"], line["output"]) for line in lines] == [(row["prompt"], row["response"]) for row, _ in best.values()]
        assert [line["reward"] for line in lines] == pytest.approx([least for _, least in best.values()])
        for line in lines:
            assert turns(line, str(detect(line))) == (line["input"], line["output"].strip()), "demonstrations of a next round"
        pairs = [json.loads(line) for line in (folder / f"preferences.{split}.jsonl").read_text().splitlines()]
        assert all(rejected(pair, "preference") for pair in pairs)
    assert (folder / "best_of_n.png").stat().st_size > 10_000 and "</svg>" in (folder / "best_of_n.svg").read_text()


def test_the_report(finished: Path) -> None:
    page = (finished / "reward-report.html").read_text()
    assert 'aria-label="best_of_n"' in page and "Reward models on held-out pairs" in page and (finished / "report.html").exists()
    report = json.loads((finished / "best_of_n/results/report.json").read_text())
    assert report["sizes"] == [1, 2, 4, 6] and list(report["selectors"]) == ["random", "init-sft", "bt", "ensemble", "oracle (golden)"]
    goldens = [row["golden"] for row in rows_of(finished / "best_of_n/results/samples/held_out")]
    by_prompt = np.array(goldens).reshape(-1, 6)
    for name in report["selectors"]:
        assert report["selectors"][name]["golden"][0] == pytest.approx(np.mean(goldens)), "one sample is one sample"
    assert report["selectors"]["oracle (golden)"]["golden"][-1] == pytest.approx(by_prompt.max(axis=1).mean())
    assert report["selectors"]["random"]["golden"] == pytest.approx([np.mean(goldens)] * 4)
    greedy = {row["id"]: -len(row["response"]) for row in rows_of(finished / "best_of_n/greedy/held_out")}
    assert report["golden"]["greedy"] == pytest.approx(np.mean(list(greedy.values())))
    base, top = report["golden"]["base"], report["golden"]["demonstrations"]
    line = report["selectors"]["init-sft"]
    assert line["normalised"] == pytest.approx([(value - base) / (top - base) for value in line["golden"]])
    assert [sum(parts) for parts in zip(line["win"], line["tie"], line["lose"], strict=True)] == pytest.approx([1.0] * 4)


def test_vllms_own_server_reads_the_same_rewards_from_a_conversation(finished: Path) -> None:
    directory = finished / "rewards/init-sft/seed-0/reward"
    talk = [{"role": "user", "content": "What is 3 and 4?"}, {"role": "assistant", "content": "3 + 4 = 7"}]
    ids = AutoTokenizer.from_pretrained(directory).apply_chat_template(talk, return_dict=False)
    asked = {"model": "ours", "messages": talk, "use_activation": False, "add_special_tokens": False}
    with served(directory, "--runner", "pooling", "--max-model-len", "256", "--dtype", "float32") as client:
        answer = client.post("/classify", json=asked).raise_for_status().json()
    assert answer["usage"]["prompt_tokens"] == len(ids) and ids[-1] == 1, "the conversation ends where the reward is read"
    want = Scorer(str(directory), Scoring(), "float32", kind="reward")([Example("a", ids[:5], (ids[5:],))])[0][0]
    assert answer["data"][0]["probs"] == pytest.approx([want], abs=1e-3)


def test_the_best_are_demonstrations_of_a_next_round(finished: Path, tiny: Path, tmp_path: Path) -> None:
    chosen = finished / "best_of_n/results/chosen.train.jsonl"
    held_out = finished / "best_of_n/results/chosen.held_out.jsonl"
    ways = ("--demonstrations.held_out_path", str(held_out), "--evaluation.metric", "none", "--iterations.stop_when_worse", "false")
    done = finish(command(tiny, chosen, tmp_path, *ways))
    assert done.returncode == 0, done.stdout + done.stderr
    best = {json.dumps(line["input"]): line["output"].strip() for line in map(json.loads, chosen.read_text().splitlines())}
    trained_on = rows_of(tmp_path / "job/demonstrations/train")
    assert best and {json.dumps(row["prompt"]): row["response"] for row in trained_on} == best
    assert (tmp_path / "job/iteration-1/training/policy/model.safetensors").exists()


def test_best_of_n_from_python(tiny: Path, demonstrations: Path, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judge_of_python.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    data = Demonstrations(
        path=str(demonstrations), max_prompt_tokens=96, max_tokens=160, limit=8, max_rejected_fraction=0.2, held_out_fraction=0.4
    )
    judge, longest = "judge_of_python:brevity", "judge_of_python:length"
    settings = BestOfN(n=3, train_prompts=None, max_new_tokens=16, golden=longest, scorers=["exact_answer"], choose_by=judge)
    folder = choose_from(Path("run"), str(tiny), data, [judge], settings, engine=Engine(kv_cache_gib=0.1), initial=str(tiny))
    samples = rows_of(folder / "samples/train")
    assert len(samples) == 3 * len(rows_of(tmp_path / "run/demonstrations/train")) > 0
    assert all(row[f"reward_{judge}"] == -len(row["response"]) == -row["golden"] for row in samples)
    assert folder == tmp_path / "run/best_of_n/results" and (folder / "best_of_n.png").exists()
    report = json.loads((folder / "report.json").read_text())
    assert list(report["selectors"]) == ["random", judge, "exact_answer", "all", "oracle (golden)"]
    # The judge likes best what the chooser likes least.
    assert (
        report["selectors"][judge]["golden"][-1]
        <= report["selectors"]["random"]["golden"][-1]
        <= report["selectors"]["oracle (golden)"]["golden"][-1]
    )
    with pytest.raises(StageError, match="choose_by='nobody' is none of judge_of_python:brevity, exact_answer, all"):
        choose_from(Path("run"), str(tiny), data, [judge], settings.model_copy(update={"choose_by": "nobody"}))
