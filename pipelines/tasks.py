"""Benchmarks of lm-eval, answered by policies: one stage a policy and a task, in parallel over both.

    policy, tokenizer, task --Ray Data--> actors, each with a process for the policy whose turn it is
        --> evaluation/gsm8k/gsm8k.parquet (TASK_ROW), evaluation/gsm8k/gsm8k.json (metrics)

A group of tasks has a file of rows for each of its tasks. Stages of one call share the processes.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.generator import environment
from actors.lmeval.engine import Question, TaskEngine
from actors.lmeval.sandbox import Limits
from actors.settings import Engine
from pipelines import base_model
from pipelines.lmeval import catalogue, local_data
from pipelines.lmeval.local_data import Local
from pipelines.lmeval.settings import Tasks
from pipelines.records import write_rows
from pipelines.run.artifacts import Run, Stage, StageError, Work, read_json, write_json
from pipelines.workers.shards import Shard, map_shards

log = logging.getLogger(__name__)
TEXTS = pa.list_(pa.string())
TASK_ROW = pa.schema(
    {
        "row": pa.int64(),
        "prompts": TEXTS,
        "continuations": TEXTS,
        "responses": TEXTS,
        "loglikelihoods": pa.list_(pa.float64()),
        "target": pa.string(),
        "answers": pa.string(),
        "scores": pa.string(),
        "score": pa.float64(),
        "verdicts": TEXTS,
    }
)
"""A row of a task: number in its split, prompts of its requests (one if they share it), choices, responses or log-probs of the choices,
right answer, {filter: what was read from the responses} and {metric: score} as JSON, the score by the main metric, how programs ended."""
ALONE = {"DISABLE_MULTIPROC": "1"}
"""lm-eval would start a process a CPU for a bootstrap."""
ROWS = 1000
"""Rows of a task whose data set nobody has looked at yet, for the display."""


def names(tasks: Tasks) -> list[str]:
    """The tasks that are asked for: presets and short names replaced, in order, none twice.

    Raises:
        StageError: lm-eval is not installed, or a name does not exist; with the nearest ones.
    """
    for name in tasks.names:
        if name not in catalogue.PRESETS:
            catalogue.find(name)
    for key in ("data", "shots"):
        for name in getattr(tasks, key):
            catalogue.find(name, f"tasks.{key}")
    return catalogue.expand(tasks.names)


def plan(name: str, task: str, policy: Stage, base: Stage, tasks: Tasks, engine: Engine) -> Stage:
    """A stage in which a policy answers a task.

    Args:
        name: of the stage.
        task: one of `names`.
        policy: who answers.
        base: where the tokenizer is; may be `policy`.
        tasks: how.
        engine: the pool.

    Raises:
        StageError: there is no such task, its files are missing, or it runs programs and nobody allowed it.
    """
    found = catalogue.find(task)
    code = any(leaf.runs_code for leaf in found.leaves)
    if code and not tasks.allow_code_execution:
        raise StageError(
            f"task {task} runs programs that the policy writes: allow it with --allow-code-execution (each gets a process with "
            "limits of time, memory and files, and no network), or leave the task out"
        )
    asked, data = (_by_name(given) for given in (tasks.shots, tasks.data))
    leaves = {}
    for leaf in found.leaves:
        shots = found.shots(leaf, asked)
        local = local_data.locate(leaf, data, shots)
        leaves[leaf.name] = {
            "version": leaf.version,
            "shots": shots,
            "splits": [local.evaluated, local.shots_from] if local else None,
            "data": local.identity() if local else None,
        }
    settings = {
        "task": found.name,
        "lm_eval": catalogue.version(),
        "leaves": leaves,
        **{key: getattr(tasks, key) for key in ("limit", "backend", "chat_template", "max_model_len", "seed")},
        "dtype": engine.dtype,
    }
    if code:
        settings["code"] = {"seconds": tasks.code_seconds, "memory_mib": tasks.code_memory_mib}
    return Stage(name, settings, {"policy": policy, "base": base}, demand=engine.demand())


def _by_name(given: Mapping[str, Any]) -> dict[str, Any]:
    return {catalogue.ALIASES.get(name, name): value for name, value in given.items()}


def evaluate(tasks: Tasks, engine: Engine, trust_remote_code: bool) -> Work:
    """Returns the work of stages of `plan`, of any policies and tasks.

    Args:
        tasks: the settings that the stages were planned with.
        engine: the pool.
        trust_remote_code: run Python code that comes with a model.
    """

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        arguments = {
            "engine": engine,
            "model": {key: getattr(tasks, key) for key in ("backend", "max_model_len", "batch_size")},
            "trust_remote_code": trust_remote_code,
        }
        shards = [shard for stage in stages for shard in _shards(run, stage, tasks)]
        # An actor changes its policy as seldom as can be: all tasks of one, then all of the next.
        policies = list(dict.fromkeys(shard.inputs for shard in shards))
        shards.sort(key=lambda shard: policies.index(shard.inputs))
        numbers = map_shards(run, shards, AnswerShards, arguments, engine, environment(engine))
        for stage in stages:
            numbers[stage.name] |= collect(run.directory(stage), stage)
        return numbers

    return work


def _shards(run: Run, stage: Stage, tasks: Tasks) -> list[Shard]:
    found, data = catalogue.find(stage.settings["task"]), _by_name(tasks.data)
    weights, tokenizer = base_model.weights(run, stage.inputs["policy"]), base_model.tokenizer(run, stage.inputs["base"])
    shards = []
    for leaf in found.leaves:
        shots = stage.settings["leaves"][leaf.name]["shots"]
        local = local_data.locate(leaf, data, shots)
        if local and local.borrowed:
            log.warning("%s: no file has examples for %s: they are other rows of %r", stage.name, leaf.name, local.evaluated)
        question = {
            "task": leaf.name,
            "file": leaf.file,
            "changes": leaf.changes,
            "shots": shots,
            "evaluated": local.evaluated if local else None,
            "shots_from": local.shots_from if local else None,
            **{key: stage.settings[key] for key in ("limit", "seed", "chat_template")},
        }
        options = {"question": question, "local": asdict(local) if local else None, "code": stage.settings.get("code")}
        output = run.directory(stage) / f"{leaf.name}.parquet"
        shards.append(Shard(stage, (weights, tokenizer), output, options, tasks.limit or ROWS))
    return shards


class AnswerShards:
    """The actor: holds the process of one policy, and the files around it.

    The process is an actor of its own, which ends with this one: vLLM gives all memory back only when its process ends.
    """

    def __init__(self, engine: Engine, model: dict[str, Any], trust_remote_code: bool):
        self.engine, self.model, self.trust_remote_code = engine, model, trust_remote_code
        self.policy: tuple[str, str] | None = None
        self.process: Any = None
        self.pid = 0

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        """A policy answers a task.

        INPUT  weights, tokenizer
        OUTPUT TASK_ROW rows, and their metrics in a .json beside
        """
        import ray

        weights, tokenizer = inputs
        local, code = options["local"], options["code"]
        question = Question(**options["question"], code=Limits(**code) if code else None)
        splits = local_data.read(question.task, Local(**local)) if local else None
        if splits and question.shots_from and question.shots >= len(splits[question.shots_from]):
            raise StageError(f"{question.task}: {question.shots} examples of {len(splits[question.shots_from])} rows: lower tasks.shots")
        if self.policy != (weights, tokenizer):
            self._load(weights, tokenizer)
        found = ray.get(self.process.__call__.remote(question, splits, tell))
        main = catalogue.main_metric(question.task, found["metrics"])
        rows = found.pop("rows")
        # The numbers first: where the rows are, the shard is taken for done.
        borrowed = question.shots_from is not None and question.shots_from == question.evaluated
        examples = {"shots": question.shots, "shots_from": question.shots_from, "borrowed": borrowed}
        write_json(Path(output).with_suffix(".json"), found | examples | {"main": main})
        write_rows(Path(output), [row | {"score": _number(json.loads(row["scores"]).get(main))} for row in rows], TASK_ROW)

    def _load(self, weights: str, tokenizer: str) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self.process is not None:
            ray.kill(self.process)
            _wait_for_the_end(self.pid)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # On this actor's CPUs and GPUs, which it does not use itself.
        remote = ray.remote(num_cpus=0, scheduling_strategy=here, runtime_env={"env_vars": environment(self.engine) | ALONE})(TaskEngine)
        self.policy = (weights, tokenizer)
        self.process = remote.remote(
            weights=weights,
            tokenizer=tokenizer,
            engine=self.engine,
            trust_remote_code=self.trust_remote_code,
            devices=os.environ.get("CUDA_VISIBLE_DEVICES") if self.engine.num_gpus else None,
            **self.model,
        )
        self.pid = ray.get(self.process.__ray_call__.remote(lambda _: os.getpid()))


def _wait_for_the_end(pid: int, seconds: float = 60) -> None:
    """Waits until a process that was killed is gone: its memory is free then."""
    deadline = time.monotonic() + seconds
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.1)


def _number(score: Any) -> float | None:
    return float(score) if isinstance(score, int | float) else None


def collect(directory: Path, stage: Stage) -> dict[str, Any]:
    """Numbers of a finished stage for its manifest.

    Returns:
        "metrics" {name: {"value", "stderr"}}; "main", the metric of the papers; "n" rows; "shots" (None where the tasks of a group differ);
        "shots_from", the split of the examples where files are local, and whether they are "borrowed" from the rows that are asked;
        "groups", the same for each task of a group.
    """
    task = catalogue.find(stage.settings["task"])
    made = {leaf.name: read_json(directory / f"{leaf.name}.json") for leaf in task.leaves}
    leaves = {name: numbers for name, numbers in made.items() if numbers}
    assert len(leaves) == len(made), f"{directory} has no numbers of {set(made) - set(leaves)}"
    if not task.group:
        return {**next(iter(leaves.values())), "groups": {}}
    metrics = pooled(list(leaves.values()), task.weighted)
    return {
        "metrics": metrics,
        "main": catalogue.main_metric(task.name, metrics),
        "n": sum(leaf["n"] for leaf in leaves.values()),
        "shots": _shared([leaf["shots"] for leaf in leaves.values()]),
        "shots_from": _shared([leaf["shots_from"] for leaf in leaves.values()]),
        "borrowed": any(leaf.get("borrowed") for leaf in leaves.values()),
        "groups": leaves,
    }


def doubts(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Warns of tasks whose examples are rows that are asked, too; numbers by policy and task."""
    borrowed = dict.fromkeys(task for done in found.values() for task, numbers in done.items() if numbers.get("borrowed"))
    return [f"{task}: no file has examples for it: they are other rows of those that are asked" for task in borrowed]


def _shared(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else None


def pooled(leaves: list[dict[str, Any]], weighted: bool) -> dict[str, dict[str, float | None]]:
    """Metrics of a group, of those that all its tasks have, as lm-eval computes them: means over rows (weighted) or tasks, and the pooled
    standard error sqrt(sum (n - 1) n se^2 / (N - k) / N) of k tasks with n rows each, N in all."""
    found: dict[str, dict[str, float | None]] = {}
    total = sum(leaf["n"] for leaf in leaves)
    for name in leaves[0]["metrics"]:
        parts = [(leaf["n"], leaf["metrics"][name]) for leaf in leaves if name in leaf["metrics"]]
        if len(parts) < len(leaves):
            continue
        weights = [n if weighted else 1 for n, _ in parts]
        value = sum(w * part["value"] for w, (_, part) in zip(weights, parts, strict=True)) / sum(weights)
        squares = [(n - 1) * n * part["stderr"] ** 2 for n, part in parts if part["stderr"] is not None]
        known = len(squares) == len(parts) and total > len(parts)
        found[name] = {"value": value, "stderr": math.sqrt(sum(squares) / (total - len(parts)) / total) if known else None}
    return found
