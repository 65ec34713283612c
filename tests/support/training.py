"""Real training processes on tiny models, without Ray around them."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from actors.learner.batches import Example
from actors.notices import FOLDER
from actors.scorer import Scorer
from actors.settings import Objective, Scoring, Training

ROWS = 14
SIDES = ("real", "generated", "mismatched")


def write_pairs(model: Path, path: Path, spoil: dict[int, float] | None = None, precision: str = "float32") -> Path:
    """Pairs whose reference is the model itself; `spoil` replaces reference log-probs of real responses by row."""
    draw = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return [int(token) for token in draw.integers(6, 280, length)]

    rows = [(ids(5 + i % 3), [*ids(3 + i % 7), 1], ids(4 + i % 5)) for i in range(ROWS)]
    rows = [(*row, rows[(i + 1) % ROWS][1 + i % 2]) for i, row in enumerate(rows)]  # type: ignore[misc]
    logps = Scorer(str(model), Scoring(), precision)([Example(str(i), row[0], row[1:]) for i, row in enumerate(rows)])
    columns: dict[str, Any] = {"id": [f"row-{i}" for i in range(ROWS)], "prompt_ids": [row[0] for row in rows]}
    for k, side in enumerate(SIDES):
        columns |= {f"{side}_ids": [row[k + 1] for row in rows], f"ref_logp_{side}": [values[k] for values in logps]}
    for row, value in (spoil or {}).items():
        columns["ref_logp_real"][row] = value
    pq.write_table(pa.table(columns), path)
    return path


def _worker(rank: int, world: int, port: int, job: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    # The server whose forks workers are began with another environment.
    os.environ |= job.pop("environment")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    from actors.learner import policy
    from actors.learner.worker import run

    if job.pop("spoil_gradient"):
        trainable = policy.trainable

        def exploding(*arguments: Any) -> Any:
            """A model whose loss is finite and whose gradient is not."""
            model = trainable(*arguments)
            next(model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
            return model

        policy.trainable = exploding  # type: ignore[assignment]
    if spoil := job.pop("spoil_export"):
        export = policy.export

        def spoiled(*arguments: Any) -> dict[str, int]:
            """Writes the policy that training started from, as a save of stale weights would, and as a gathering of them would."""
            written = export(*arguments)
            _, _, weights, _, directory, *_ = arguments
            shutil.copy2(Path(weights) / "model.safetensors", directory)
            if spoil == "file":
                return written
            # What was gathered from the workers is as stale.
            loaded = policy.load(str(directory), job["training"].precision, None, False)
            return policy.digests(dict(loaded.named_parameters(remove_duplicate=False)))

        policy.export = spoiled  # type: ignore[assignment]
    if run(job):
        # A gang that trains several models has room for one at a time; under ZeRO-3 it trains one.
        left = [o for o in gc.get_objects() if isinstance(o, torch.optim.Optimizer) or type(o).__name__ == "DeepSpeedEngine"]
        assert not left or job["training"].zero_stage == 3, [type(o).__name__ for o in left]
    torch.distributed.destroy_process_group()


def start(model: Path, data: Path, output: Path, world: int, objective: Objective, **settings: Any) -> list[BaseProcess]:
    """Starts `world` workers. Beside settings: `theirs` is what a user's DeepSpeed JSON says, `spoil` ("file" or "weights") makes them
    write another policy, `spoil_gradient` makes every gradient infinite."""
    theirs, spoil, kind = settings.pop("theirs", None), settings.pop("spoil", None), settings.pop("kind", "policy")
    exploding = settings.pop("spoil_gradient", False)
    options = {"workers": world, "batch_size": 8, "epochs": 2, "learning_rate": 1e-3, "micro_batch_tokens": 64, "checkpoint_every": 0}
    files = {"train": [str(data)], "held_out": [str(data)], "output": str(output)}
    job = {"name": "test/training", "weights": str(model), "tokenizer": str(model), "objective": objective} | files
    job |= {
        "training": Training(**(options | settings)),
        "deepspeed": theirs,
        "spoil_export": spoil,
        "spoil_gradient": exploding,
        "kind": kind,
    }
    job["environment"] = {FOLDER: os.environ[FOLDER]} if FOLDER in os.environ else {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output.mkdir(parents=True, exist_ok=True)
    # Imports take seconds: one server makes them once, workers are its forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["actors.learner.worker", "deepspeed", "peft"])
    processes: list[BaseProcess] = [context.Process(target=_worker, args=(rank, world, port, job)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def train(model: Path, data: Path, output: Path, world: int, objective: Objective, **settings: Any) -> list[dict[str, float]]:
    """Trains in `world` real processes and returns the metrics of the steps."""
    processes = start(model, data, output, world, objective, **settings)
    end(processes)
    assert failure_of(output) is None, failure_of(output)
    assert [process.exitcode for process in processes] == [0] * world
    return steps_of(output)


def end(processes: list[BaseProcess], seconds: float = 120) -> None:
    """Waits for workers; workers that wait for each other for ever are killed."""
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()


def failure_of(output: Path) -> str | None:
    """Why workers gave up."""
    return next((json.loads(path.read_text())["error"] for path in sorted((output / "failed").glob("*.json"))), None)


def kill_when(processes: list[BaseProcess], condition: Callable[[], bool]) -> None:
    """SIGKILL to all workers as soon as `condition` holds."""
    while not condition():
        assert all(process.is_alive() for process in processes), "the workers ended before they could be killed"
        time.sleep(0.01)
    for process in processes:
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()


def steps_of(output: Path) -> list[dict[str, float]]:
    """The metrics of a stage."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_steps(ours: list[dict[str, float]], theirs: list[dict[str, float]], rel: float = 1e-3) -> None:
    """Two runs took the same steps, to rounding."""
    assert [step["step"] for step in ours] == [step["step"] for step in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "reward_real", "reward_generated", "grad_norm", "logps_real"):
            if key in b:
                close = abs(a[key] - b[key]) <= 1e-4 + rel * abs(b[key])
                assert close, f"step {a['step']}: {key} is {a[key]}, not {b[key]}"
