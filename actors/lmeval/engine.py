"""A policy that answers tasks of lm-eval: its model in lm-eval's own classes for vLLM and transformers, with this project's settings.

lm-eval builds the prompts, reads the answers and computes the metrics; what it logs of every row comes back as plain rows.
"""

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from actors.lmeval.models import in_transformers, in_vllm, silent
from actors.lmeval.sandbox import CodeEval, Limits
from actors.loading import loading
from actors.settings import Engine

CODE = CodeEval()
"""One in a process: lm-eval's modules for code keep the first that they get."""
BOOTSTRAP = 1000
"""Samples for the standard error of metrics that are no means."""
Rows = list[dict[str, Any]]
Splits = Mapping[str, Rows]


@dataclass(frozen=True)
class Question:
    """A task and how it is asked."""

    task: str
    file: str
    """lm-eval's YAML file of it"""
    changes: Mapping[str, Any]
    """keys in place of the file's"""
    shots: int
    """examples before each row"""
    limit: int | None
    """rows at most"""
    seed: int
    """of the choice of examples"""
    chat_template: bool
    """prompts are conversations"""
    evaluated: str | None = None
    """with local rows: the split that is asked"""
    shots_from: str | None = None
    """with local rows: the split of the examples, if any"""
    code: Limits | None = None
    """what a program may take; None: no program is run"""


class TaskEngine:
    """Loads a policy.

    Args:
        backend: "vllm" or "transformers".
        weights: directory or hub id of the policy.
        tokenizer: directory of the run's tokenizer and stop tokens.
        engine: settings.
        max_model_len: longest prompt and answer, tokens; None for the model's context.
        batch_size: rows in one forward pass of transformers.
        trust_remote_code: run Python code that comes with the model.
        devices: the value of CUDA_VISIBLE_DEVICES, where somebody else chose the GPUs; None leaves it.

    Raises:
        ValueError: the policy cannot be loaded.
    """

    def __init__(
        self,
        backend: str,
        weights: str,
        tokenizer: str,
        engine: Engine,
        max_model_len: int | None,
        batch_size: int,
        trust_remote_code: bool,
        devices: str | None = None,
    ):
        if devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices
        load = {"vllm": in_vllm, "transformers": in_transformers}[backend]
        try:
            with loading():
                self.lm = load(weights, tokenizer, engine, max_model_len, batch_size, trust_remote_code)
        except Exception as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the policy in {weights} cannot be loaded by {backend}: {said}") from error

    def __call__(self, question: Question, splits: Splits | None, tell: Callable[[int], None] | None = None) -> dict[str, Any]:
        """Answers a task; see `answer`."""
        self.lm.tell = tell or silent
        return answer(self.lm, build(question, splits), question)


def build(question: Question, splits: Splits | None) -> Any:
    """lm-eval's task, on local rows if there are any.

    Raises:
        ValueError: its data set cannot be loaded, or the rows are of another one.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks need lm-eval, which is not installed: uv pip install -e '.[eval]'")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    with code_metric():
        config = dict(load_yaml(question.file, resolve_func=True)) | dict(question.changes)
        for key in ("tag", "group", "task_list"):
            config.pop(key, None)
        config["task"] = question.task
        if splits is not None:
            config = on_local_rows(config, question, splits)
        cls = config.pop("class", ConfigurableTask)
        try:
            return cls(config=config)
        except Exception as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if splits is not None:
                raise ValueError(
                    f"the files in tasks.data do not look like {question.task}: {said}; their first row has "
                    f"{', '.join(map(repr, next(iter(splits.values()))[0]))}"
                ) from error
            raise ValueError(
                f"the data set {config.get('dataset_path')!r} of task {question.task} cannot be loaded: {said}. Check the network, or "
                f"name local files in tasks.data.{question.task}"
            ) from error


def on_local_rows(config: Mapping[str, Any], question: Question, splits: Splits) -> dict[str, Any]:
    """A task's keys with rows in place of its data set.

    Examples from the evaluated split leave out the row itself: lm-eval does that for a split that is evaluated as "test" alone.
    """
    from datasets import Dataset, DatasetDict

    def load(**_: Any) -> Any:
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})

    shots = {key: value for key, value in (config.get("fewshot_config") or {}).items() if key != "split"}
    return dict(config) | {
        "custom_dataset": load,
        "dataset_kwargs": None,
        "training_split": None,
        "validation_split": None,
        "test_split": question.evaluated,
        "fewshot_split": question.shots_from,
        "fewshot_config": shots or None,
    }


@contextlib.contextmanager
def code_metric() -> Iterator[None]:
    """While it lasts, `evaluate.load("code_eval")` gives the sandbox, without asking the hub."""
    import evaluate

    load = evaluate.load
    evaluate.load = lambda path, *arguments, **options: CODE if path == "code_eval" else load(path, *arguments, **options)
    try:
        yield
    finally:
        evaluate.load = load


def answer(lm: Any, task: Any, question: Question) -> dict[str, Any]:
    """Asks a model the rows of a task.

    Args:
        lm: a model of lm-eval's kind.
        task: from `build`.
        question: how.

    Returns:
        "rows": one a row of the data set, in order (see `row`); "metrics": {name: {"value", "stderr"}}, names as lm-eval's,
        "metric,filter", without the filter "none"; "n": rows; "version": the task's.
    """
    from lm_eval.evaluator import evaluate

    if question.code:
        CODE.limits = question.code
    CODE.reasons.clear()
    task.set_config("num_fewshot", question.shots)
    task.set_fewshot_seed(question.seed)
    results = evaluate(
        lm,
        {"tasks": {question.task: task}},
        limit=question.limit,
        bootstrap_iters=BOOTSTRAP,
        apply_chat_template=question.chat_template,
        fewshot_as_multiturn=question.chat_template,
        confirm_run_unsafe_code=question.code is not None,
    )
    logged = results["samples"][question.task]
    by_row: dict[int, Rows] = {}
    for sample in logged:
        by_row.setdefault(sample["doc_id"], []).append(sample)
    rows = [row(task, number, samples) for number, samples in sorted(by_row.items())]
    return {"rows": rows, "metrics": metrics(results["results"][question.task]), "n": len(rows), "version": str(task.VERSION)}


def metrics(found: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-eval's {"acc,none": 0.5, "acc_stderr,none": 0.1} as {"acc": {"value": 0.5, "stderr": 0.1}}."""
    read: dict[str, dict[str, float | None]] = {}
    for key, value in found.items():
        name, comma, chosen = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            stderr = found.get(f"{name}_stderr,{chosen}")
            number = float(stderr) if isinstance(stderr, int | float) else None
            read[_named(name, chosen)] = {"value": float(value), "stderr": number}
    return read


def _named(metric: str, chosen: str) -> str:
    return metric if chosen == "none" else f"{metric},{chosen}"


def row(task: Any, number: int, samples: Rows) -> dict[str, Any]:
    """One row of a task with what came of it.

    Args:
        task: lm-eval's.
        number: of the row in its split, from 0.
        samples: what lm-eval logged of it, once for each of its filters.

    Returns:
        "row"; "prompts", one if all requests share it; "continuations", of the choices; "responses", the generated texts;
        "loglikelihoods", of the choices; "target"; "answers" {filter: what it read}; "scores" {metric: score}; "verdicts", how programs
        ended.
    """
    first = samples[0]
    prompts = [str(arguments[0]) for arguments in first["arguments"]]
    responses = [response for one in first["resps"] for response in one]
    scored = bool(responses) and isinstance(responses[0], tuple | list)
    answers = {sample["filter"]: sample["filtered_resps"] for sample in samples}
    scores = {_named(name, sample["filter"]): sample[name] for sample in samples for name in sample["metrics"]}
    tests = str(first["target"])
    programs = [program for one in first["filtered_resps"] for program in (one if isinstance(one, list) else [one])]
    return {
        "row": number,
        "prompts": prompts[:1] if len(set(prompts)) == 1 else prompts,
        "continuations": [str(arguments[1]) for arguments in first["arguments"]] if scored else [],
        "responses": [] if scored else [str(response) for response in responses],
        "loglikelihoods": [float(response[0]) for response in responses] if scored else [],
        "target": target(task, first),
        "answers": json.dumps({} if scored else answers, default=str),
        "scores": json.dumps(scores, default=str),
        "verdicts": [CODE.reasons[program, tests] for program in programs if (program, tests) in CODE.reasons],
    }


def target(task: Any, sample: Mapping[str, Any]) -> str:
    """The right answer in words; of a choice by number, that choice."""
    gold = task.doc_to_text(sample["doc"]) if getattr(task, "multiple_input", 0) else sample["target"]
    if isinstance(gold, int) and task.config.doc_to_choice is not None:
        choices = task.doc_to_choice(sample["doc"])
        return str(choices[gold]) if 0 <= gold < len(choices) else str(gold)
    return str(gold)
