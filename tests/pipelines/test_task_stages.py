"""Benchmarks as stages: names, files, what stops before anything starts, and policies end to end."""

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from benchmarks_rows import AI2, WINOGRANDE, problems, write_gsm8k, write_lines
from models import write_tiny

from actors.settings import Engine
from pipelines import tasks
from pipelines.base_model import write_tokenizer
from pipelines.lmeval import catalogue, local_data
from pipelines.lmeval.settings import Tasks
from pipelines.run.artifacts import Run, Stage, StageError, write_json
from pipelines.settings import Model

LM: Any = pytest.importorskip("lm_eval.api.model", reason="the extra eval is not installed").LM
ENGINE = Engine(kv_cache_gib=0.25, dtype="float32")
POLICY = Stage("policy", {})


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    return write_gsm8k(tmp_path)


def test_names_of_presets_and_short_ones() -> None:
    assert tasks.names(Tasks(names=["musr", "gsm8k", "gsil", "gsm8k"]))[:4] == [
        "leaderboard_musr",
        "gsm8k",
        "arc_challenge",
        "truthfulqa_mc2",
    ]
    for name in [*catalogue.PRESETS["gsil"], *catalogue.PRESETS["dil"], "mbpp", "bbh", "mmlu_pro"]:
        assert catalogue.find(name).leaves, name
    shots = {name: {catalogue.find(name).shots(leaf, {}) for leaf in catalogue.find(name).leaves} for name in catalogue.SHOTS}
    assert shots == {name: {count} for name, count in catalogue.SHOTS.items()}
    dil = {name: {catalogue.find(name).shots(leaf, {}) for leaf in catalogue.find(name).leaves} for name in catalogue.PRESETS["dil"]}
    assert list(dil.values()) == [{5}, {3}, {0}, {4}, {5}, {25}], "leaderboard 2 by its default setting"


def test_groups_and_tags_are_lm_evals() -> None:
    mmlu = catalogue.find("mmlu")
    assert len(mmlu.leaves) == 57 and mmlu.group and mmlu.weighted and {leaf.version for leaf in mmlu.leaves} == {1.0}
    assert mmlu.leaves[0].config["dataset_name"] and mmlu.shots(mmlu.leaves[0], {"mmlu_stem": 2}) == 2
    assert [leaf.runs_code for name in ("humaneval", "mbpp", "gsm8k") for leaf in catalogue.find(name).leaves] == [True, True, False]
    assert {leaf.name for leaf in catalogue.find("ai2_arc").leaves} == {"arc_easy", "arc_challenge"}


@pytest.mark.parametrize(
    ("name", "near"), [("gsm8", "gsm8k"), ("arc-challenge", "arc_challenge"), ("gsl", "gsil"), ("mmlupro", "mmlu_pro")]
)
def test_a_name_that_does_not_exist(name: str, near: str) -> None:
    with pytest.raises(StageError, match=rf"no task '{name}'; did you mean .*{near}"):
        tasks.names(Tasks(names=["winogrande", name]))
    with pytest.raises(StageError, match=rf"tasks\.data: lm-eval \S+ has no task '{name}'"):
        tasks.names(Tasks(names=["winogrande"], data={name: "/data"}))


def plan(asked: Tasks, task: str = "gsm8k", policy: Stage = POLICY) -> Stage:
    return tasks.plan(f"evaluation/{policy.name}/{task}", task, policy, policy, asked, ENGINE)


def test_what_stops_before_anything_starts(gsm8k: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageError, match=r"tasks\.data\.gsm8k='/nowhere': there is no such file or directory"):
        plan(Tasks(data={"gsm8k": "/nowhere"}))
    with pytest.raises(
        StageError, match=r"no file or folder is called 'validation', the split of winogrande, among test\.jsonl, train\.jsonl"
    ):
        plan(Tasks(data={"winogrande": str(gsm8k)}), "winogrande")
    with pytest.raises(StageError, match=r"task mbpp runs programs .* allow it with --allow-code-execution"):
        plan(Tasks(), "mbpp")
    assert plan(Tasks(allow_code_execution=True), "mbpp").settings["code"] == {"seconds": 5.0, "memory_mib": 1024}

    def nothing(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", nothing)
    with pytest.raises(StageError, match=r"lm-eval, which is not installed: uv pip install -e '\.\[eval\]'"):
        tasks.names(Tasks(names=["gsm8k"]))


def test_the_fingerprint_knows_what_was_asked(gsm8k: Path) -> None:
    given = Tasks(data={"gsm8k": str(gsm8k)}, limit=2)
    first = plan(given).fingerprint
    assert plan(given.model_copy(update={"batch_size": 3})).fingerprint == first
    others = [
        plan(given.model_copy(update=change)).fingerprint for change in ({"limit": 3}, {"shots": {"gsm8k": 1}}, {"backend": "transformers"})
    ]
    write_lines(gsm8k / "test.jsonl", problems(11))
    others += [plan(given).fingerprint, plan(Tasks(limit=2)).fingerprint]
    assert len({first, *others}) == 6


def test_files_are_told_apart(tmp_path: Path) -> None:
    def names(*files: str, task: str = "gsm8k", data: str | None = None, shots: int = 1) -> dict[str, list[str]]:
        for file in files:
            write_lines(tmp_path / file, problems(1))
        leaf = catalogue.find(task).leaves[0]
        local = local_data.locate(leaf, {data or task: str(tmp_path / files[0].split("/")[0])}, shots)
        assert local
        return {split: [Path(file).name for file in found] for split, found in local.files.items()}

    assert names("a/x_test-0.jsonl", "a/x_test-1.jsonl", "a/x_train.jsonl") == {
        "test": ["x_test-0.jsonl", "x_test-1.jsonl"],
        "train": ["x_train.jsonl"],
    }
    assert names("b/main/test-00000-of-00001.jsonl", "b/main/train.jsonl", "b/socratic/test.jsonl") == {
        "test": ["test-00000-of-00001.jsonl"],
        "train": ["train.jsonl"],
    }
    assert names("c/test/0.jsonl", "c/train/1.jsonl") == {"test": ["0.jsonl"], "train": ["1.jsonl"]}
    assert names("d/rows.jsonl") == {"test": ["rows.jsonl"]}
    mmlu = catalogue.find("mmlu").leaves[0].config["dataset_name"]
    files = [f"e/{mmlu}/{split}-0.jsonl" for split in ("dev", "test", "validation")]
    assert names(*files, task="mmlu", data="mmlu") == {"test": ["test-0.jsonl"], "dev": ["dev-0.jsonl"]}
    assert names(*files, task="mmlu", data="mmlu", shots=0) == {"test": ["test-0.jsonl"]}
    assert names("f/murder_mysteries.jsonl", "f/team_allocation.jsonl", task="leaderboard_musr") == {
        "murder_mysteries": ["murder_mysteries.jsonl"]
    }


def test_rows_that_do_not_look_like_the_task(tmp_path: Path) -> None:
    (leaf,) = catalogue.find("arc_challenge").leaves

    def read(text: str) -> None:
        (tmp_path / "test.jsonl").write_text(text)
        local = local_data.locate(leaf, {"arc_challenge": str(tmp_path)}, 0)
        assert local
        local_data.read("arc_challenge", local)

    with pytest.raises(StageError, match=r"test\.jsonl: row 2 of task arc_challenge: broken JSON"):
        read(json.dumps(AI2) + '\n{"id": \n')
    with pytest.raises(StageError, match=r"test\.jsonl:1: the row does not look like arc_challenge: it has a, and no 'question'"):
        read('{"a": 1}\n')


def test_pooled_metrics_are_lm_evals() -> None:
    leaves = [{"n": n, "metrics": {"acc": {"value": v, "stderr": s}}} for n, v, s in ((10, 0.5, 0.1), (30, 0.9, 0.05))]
    # sqrt((9 * 10 * 0.01 + 29 * 30 * 0.0025) / 38 / 40)
    assert tasks.pooled(leaves, True) == {"acc": {"value": pytest.approx(0.8), "stderr": pytest.approx(0.044978, abs=1e-6)}}
    assert tasks.pooled(leaves, False)["acc"]["value"] == pytest.approx(0.7)
    assert tasks.pooled([*leaves, {"n": 1, "metrics": {}}], True) == {}


def policy(run: Run, weights: Path, name: str = "policy") -> Stage:
    """A stage that holds a policy and its tokenizer."""
    stage = Stage(name, {"weights": str(weights)})
    directory = run.directory(stage)
    directory.mkdir(parents=True)
    write_json(directory / "source.json", {"weights": str(weights)})
    write_tokenizer(Model(), {"pretrained_model_name_or_path": str(weights)}, directory)
    return stage


@contextlib.contextmanager
def seen_at_once(process: str) -> Iterator[list[int]]:
    """How many processes of a name there are, looked at again and again."""
    counts, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            counts.append(len(subprocess.run(["pgrep", "-f", process], capture_output=True, text=True, check=False).stdout.split()))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield counts
    finally:
        over.set()
        looking.join()


@pytest.mark.parametrize(
    ("backend", "seeds"), [("vllm", (0,)), *(pytest.param(backend, (0, 1), marks=pytest.mark.slow) for backend in ("transformers", "vllm"))]
)
def test_policies_answer_tasks(
    backend: str, seeds: tuple[int, ...], local_ray: None, gsm8k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    # Twice the same, and longer behind the gap than a block of an engine's cache.
    tail = " and everybody who was there could see it from where they stood."
    rows = [row | {"sentence": row["sentence"][:-1] + tail} for row in WINOGRANDE for _ in range(2)]
    winogrande = write_lines(tmp_path / "winogrande" / "dev.jsonl", rows)
    shots = {"gsm8k": 1, "winogrande": 2 if backend == "transformers" else 0}
    given = Tasks(
        names=["gsm8k", "winogrande"],
        data={"gsm8k": str(gsm8k), "winogrande": str(winogrande)},
        limit=3,
        shots=shots,
        backend=backend,
    )
    weights = [write_tiny(tmp_path / f"weights{seed}", seed=seed, std=0.2) for seed in seeds]
    policies = [policy(run, directory, directory.name) for directory in weights]
    stages = [plan(given, task, held) for held in policies for task in tasks.names(given)]
    # Policies and tasks side by side, as many as there are actors: none begins before all are up.
    at_once = len(seeds)
    monkeypatch.setattr(ray.data.DataContext.get_current(), "wait_for_min_actors_s", 60)
    with seen_at_once("ray::TaskEngine") as most:
        run.do(tasks.evaluate(given, ENGINE.model_copy(update={"min_actors": at_once, "max_actors": at_once}), False), *stages)
    assert max(most) == at_once
    for stage in stages:
        numbers, task = run.numbers(stage), stage.settings["task"]
        assert numbers["n"] == 3 and numbers["groups"] == {}
        assert numbers["shots"] == shots[task]
        assert numbers["shots_from"] == ("train" if task == "gsm8k" else "validation" if shots[task] else None)
        rows = pq.read_table(run.directory(stage) / f"{task}.parquet").to_pylist()
        mean = sum(row["score"] for row in rows) / 3
        assert numbers["metrics"][numbers["main"]]["value"] == pytest.approx(mean)
        assert all(len(row["responses"]) == 1 if task == "gsm8k" else len(row["loglikelihoods"]) == 2 for row in rows)
    for directory, stage in zip(weights, stages[1::2], strict=True):
        check_loglikelihoods(directory, pq.read_table(run.directory(stage) / "winogrande.parquet").to_pylist())
    wait_until(lambda: not subprocess.run(["pgrep", "-f", "ray::TaskEngine"], capture_output=True, check=False).stdout)
    monkeypatch.setattr(tasks, "map_shards", None)
    Run(tmp_path / "run").do(tasks.evaluate(given, ENGINE, False), *stages)


def wait_until(done: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "a policy's process does not outlive the actor that holds it"
        time.sleep(0.2)


def check_loglikelihoods(weights: Path, rows: list[dict[str, Any]]) -> None:
    """Log-probs of continuations, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, words = AutoModelForCausalLM.from_pretrained(weights).eval(), AutoTokenizer.from_pretrained(weights)
    for row in rows:
        for prompt, continuation, got in zip(row["prompts"], row["continuations"], row["loglikelihoods"], strict=True):
            ids = torch.tensor([words(prompt + continuation).input_ids[-512:]])
            start = ids.shape[1] - (len(words(prompt + continuation).input_ids) - len(words(prompt).input_ids))
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1)
            want = logps.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()
            assert got == pytest.approx(want, abs=2e-3)


def test_a_checkpoint_that_does_not_load(local_ray: None, tiny: Path, gsm8k: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    held = policy(run, tiny)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((tiny / "config.json").read_text())
    write_json(run.directory(held) / "source.json", {"weights": str(broken)})
    given = Tasks(names=["gsm8k"], data={"gsm8k": str(gsm8k)}, limit=1, backend="transformers")
    with pytest.raises(StageError, match=rf"the policy in {broken} cannot be loaded by transformers"):
        run.do(tasks.evaluate(given, ENGINE, False), plan(given, policy=held))
