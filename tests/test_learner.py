"""The learner under real DeepSpeed: any number of workers takes the same steps; the exported policy is the trained one."""

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.learner.batches import Example
from actors.scorer import Scorer
from actors.settings import Objective, Scoring, Training

ROWS = 14


@pytest.fixture(scope="module")
def pairs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose reference is the tiny model itself."""
    draw = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return [int(token) for token in draw.integers(6, 280, length)]

    rows = [(ids(5 + i % 3), [*ids(3 + i % 7), 1], ids(4 + i % 5)) for i in range(ROWS)]
    scorer = Scorer(str(tiny), Scoring(), Training())
    logps = scorer([Example(str(i), row[0], row[1:]) for i, row in enumerate(rows)])
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    names = ("prompt_ids", "real_ids", "generated_ids")
    columns: dict[str, Any] = {"id": [str(i) for i in range(ROWS)]} | {n: [row[k] for row in rows] for k, n in enumerate(names)}
    columns |= {"ref_logp_real": [pair[0] for pair in logps], "ref_logp_generated": [pair[1] for pair in logps]}
    pq.write_table(pa.table(columns), path)
    return path


def worker(rank: int, world: int, port: int, job: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    from actors.learner.worker import run

    run(job)
    torch.distributed.destroy_process_group()


def train(tiny: Path, pairs: Path, output: Path, world: int, objective: Objective | None = None, **settings: Any) -> list[dict[str, float]]:
    """Trains in `world` real processes and returns the metrics of the steps."""
    options = {"workers": world, "batch_size": 8, "epochs": 2, "learning_rate": 1e-3, "micro_batch_size": 4} | settings
    files = {"train": [str(pairs)], "held_out": [str(pairs)], "output": str(output)}
    job = {"name": "test", "weights": str(tiny), "tokenizer": str(tiny), "training": Training(**options), "objective": objective} | files
    context = multiprocessing.get_context("spawn")
    port = 29600 + os.getpid() % 300
    processes = [context.Process(target=worker, args=(rank, world, port, job)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tiny: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, float]], Path]:
    """One worker, one micro-batch a step."""
    output = tmp_path_factory.mktemp("alone")
    return train(tiny, pairs, output, 1, Objective(beta=0.1), micro_batch_size=8), output


def test_the_first_step_starts_at_the_reference(alone: tuple[list[dict[str, float]], Path]) -> None:
    first = alone[0][0]
    assert first["loss"] == pytest.approx(2 * np.log(2), abs=1e-5)
    assert first["reward_real"] == pytest.approx(0, abs=1e-5) and first["reward_generated"] == pytest.approx(0, abs=1e-5)


def test_training_tells_real_from_generated(alone: tuple[list[dict[str, float]], Path]) -> None:
    steps = alone[0]
    assert len(steps) == 4 and steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["margin"] > 0.01
    logged = {"loss", "loss_real", "loss_generated", "reward_real", "reward_generated", "margin", "accuracy"}
    assert logged | {"logps_real", "logps_generated", "grad_norm", "learning_rate", "tokens_per_second"} <= set(steps[0])


@pytest.mark.parametrize(("world", "micro", "zero"), [(1, 2, 1), (2, 2, 0), (2, 4, 2), (2, 1, 3)])
def test_workers_micro_batches_and_zero_stages_take_the_same_steps(
    world: int, micro: int, zero: int, alone: tuple[list[dict[str, float]], Path], tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    steps = train(tiny, pairs, tmp_path, world, Objective(beta=0.1), micro_batch_size=micro, zero_stage=zero)
    for ours, theirs in zip(steps, alone[0], strict=True):
        for key in ("loss", "reward_real", "reward_generated", "grad_norm", "logps_real"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), key
    held_out = [json.loads((path / "held_out.json").read_text()) for path in (tmp_path, alone[1])]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_exported_policy_scores_as_the_trainer_did(precision: str, tiny: Path, pairs: Path, tmp_path: Path) -> None:
    train(tiny, pairs, tmp_path, 2, Objective(beta=0.1), precision=precision, micro_batch_size=2, zero_stage=2)
    table = pq.read_table(pairs).to_pylist()
    scorer = Scorer(str(tmp_path / "policy"), Scoring(), Training(precision=precision, zero_stage=1))
    logps = scorer([Example(r["id"], r["prompt_ids"], (r["real_ids"], r["generated_ids"])) for r in table])
    rho = [[a - r["ref_logp_real"], b - r["ref_logp_generated"]] for (a, b), r in zip(logps, table, strict=True)]
    trainer = [[row["rho_real"], row["rho_generated"]] for row in pq.read_table(tmp_path / "held_out.parquet").to_pylist()]
    assert np.abs(np.array(rho) - np.array(trainer)).max() < (1e-3 if precision == "float32" else 0.25)
    assert np.abs(np.array(trainer)).max() > 0.5, "the policy moved"


def test_the_exported_directory_is_a_plain_hugging_face_model(alone: tuple[list[dict[str, float]], Path], tiny: Path) -> None:
    policy = alone[1] / "policy"
    model = AutoModelForCausalLM.from_pretrained(policy)
    before = AutoModelForCausalLM.from_pretrained(tiny)
    assert model.config.vocab_size == before.config.vocab_size and model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(policy).chat_template == AutoTokenizer.from_pretrained(tiny).chat_template
    assert (policy / "model.safetensors").exists() and (policy / "generation_config.json").exists()
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_sft_raises_the_log_probs_of_demonstrations(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    rows = pq.read_table(pairs)
    demonstrations = tmp_path / "demonstrations.parquet"
    pq.write_table(pa.table({"id": rows["id"], "prompt_ids": rows["prompt_ids"], "response_ids": rows["real_ids"]}), demonstrations)
    steps = train(tiny, demonstrations, tmp_path / "out", 1, None, epochs=3)
    assert len(steps) == 6 and {"loss", "logps_real", "grad_norm"} <= set(steps[0])
    after = json.loads((tmp_path / "out" / "held_out.json").read_text())["logps_real"]
    assert after > np.mean(rows["ref_logp_real"].to_pylist()) + 1
