"""Demonstrations and models by hub id: the real hub clients against a small hub on this machine."""

import importlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hub import serving

from pipelines import base_model
from pipelines.data import sources
from pipelines.run.artifacts import Run, StageError
from pipelines.settings import Model

SPLITS = {name: [{"question": f"{i} + {i}, {name}?", "answer": f"#### {2 * i}"} for i in range(3)] for name in ("train", "test")}
Inside = Callable[..., Any]
"""Calls a function in the process that knows the small hub."""


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    from models import write_tiny

    root = tmp_path_factory.mktemp("hub")
    sums = root / "datasets" / "someone" / "sums"
    sums.mkdir(parents=True)
    for name, rows in SPLITS.items():
        (sums / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    write_tiny(root / "models" / "someone" / "tiny")
    # The clients read their settings when they are imported: a process that starts with these calls them.
    spawn = multiprocessing.get_context("spawn")
    with serving(root) as url, pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, spawn) as pool:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))]:
            patch.delenv(name)
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(root / "cache"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        # datasets also asks datasets-server.127.0.0.1, which no one has: where no name server answers, that takes 1 s and not 20.
        for name, value in (settings | {"NO_PROXY": "127.0.0.1", "RES_OPTIONS": "timeout:1 attempts:1"}).items():
            patch.setenv(name, value)
        # Not counted as time that a test took.
        for client in ("datasets", "transformers"):
            pool.submit(_import, client).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def _import(name: str) -> None:
    importlib.import_module(name)


def _read(path: str, split: str) -> list[sources.RawRow]:
    return [row for file in sources.find(path, split) for row in sources.read(file, None, split)]


def _base(path: str, root: Path) -> tuple[dict[str, Any], str]:
    """The stage without Ray: its numbers, and where the weights are."""
    model, run = Model(path=path), Run(root)
    stage = base_model.plan(model)

    def work(*_: Any) -> dict[str, dict[str, Any]]:
        base_model.convert(base_model.absolute(path), run.directory(stage))
        return {stage.name: base_model.tokenize(model, base_model.absolute(path), run.directory(stage))}

    run.do(work, stage)
    return run.numbers(stage), base_model.weights(run, stage)


def _parameters(weights: str) -> int:
    from transformers import AutoModelForCausalLM

    return int(AutoModelForCausalLM.from_pretrained(weights).num_parameters())


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_of_a_hub_data_set_is_read(split: str, inside: Inside) -> None:
    rows = inside(_read, "someone/sums", split)
    assert [json.loads(row["row"]) for row in rows] == SPLITS[split]
    assert [row["source"] for row in rows] == [f"someone/sums/{split}:{i}" for i in (1, 2, 3)] and not any(row["reason"] for row in rows)
    assert sources.identity(["hub:someone/sums"], None, split) == [["hub:someone/sums", None, split]]


def test_a_model_is_read_from_the_hub(inside: Inside, tmp_path: Path) -> None:
    numbers, weights = inside(_base, "someone/tiny", tmp_path)
    assert numbers | {"plain_chat_template": False, "stop_ids": [1], "context": 512, "shares_prompt": True} == numbers
    assert (tmp_path / "base" / "model" / "tokenizer" / "tokenizer.json").exists()
    # Engines and workers load the weights, by the same id.
    assert weights == "someone/tiny" and inside(_parameters, weights) > 0


def refusal(inside: Inside, function: Callable[..., Any], *arguments: Any) -> str:
    started = time.monotonic()
    with pytest.raises(StageError) as error:
        inside(function, *arguments)
    # A name that the clients tried again and again would take 23 s.
    assert time.monotonic() - started < 20
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_wrong_name_is_one_clear_line_at_once(inside: Inside, tmp_path: Path) -> None:
    text = refusal(inside, _read, "someone/sums", "dev")
    assert "hub data set 'someone/sums'" in text and "split 'dev'" in text and "one of ['train', 'test']. Check" in text
    text = refusal(inside, _read, "someone/unknown", "train")
    assert "hub data set 'someone/unknown'" in text and "doesn't exist on the Hub or cannot be accessed. Check" in text
    text = refusal(inside, _base, "someone/unknown", tmp_path)
    assert "the model 'someone/unknown' cannot be loaded" in text and "not a valid model identifier" in text
