"""A model that is not whole is named before anything loads it."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.settings import Training
from pipelines.base_model import check, convert, plan, write_tokenizer
from pipelines.run.artifacts import Run, Stage, StageError
from pipelines.settings import Model


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_a_whole_model_is_read_in_place(model: Path, tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    convert(str(model), tmp_path / "stage")
    assert json.loads((tmp_path / "stage" / "source.json").read_text()) == {"weights": str(model)}


def test_weights_that_are_not_there(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(StageError, match=rf"{model} holds no weights of a model"):
        convert(str(model), tmp_path / "stage")


@pytest.mark.parametrize("left", [0, 100, -1])
def test_weights_that_were_cut_off(model: Path, tmp_path: Path, left: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(StageError, match=rf"{file} is damaged or was cut off"):
        convert(str(model), tmp_path / "stage")


def test_a_part_of_the_weights_that_is_not_there(model: Path, tmp_path: Path) -> None:
    parts = {"one": "model.safetensors", "two": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(StageError, match=r"lacks model-00002-of-00002\.safetensors, which model\.safetensors\.index\.json names"):
        convert(str(model), tmp_path / "stage")


def test_a_file_that_is_no_model(model: Path) -> None:
    with pytest.raises(StageError, match=r"model\.safetensors' is a file, not a model directory: name the directory"):
        plan(Model(path=str(model / "model.safetensors")))


def test_a_model_that_does_not_say_how_many_tokens_it_embeds_is_taken(tiny: Path, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from transformers import LlamaModel

    def unsaid(self: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(LlamaModel, "get_input_embeddings", unsaid)
    write_tokenizer(Model(path=str(model)), {"pretrained_model_name_or_path": str(model)}, tmp_path)
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists()


def test_tokens_without_an_embedding(tiny: Path, model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, source = AutoTokenizer.from_pretrained(tiny), {"pretrained_model_name_or_path": str(model)}
    config, tokens = json.loads((model / "config.json").read_text()), len(tokenizer)
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": tokens + 5}))
    write_tokenizer(Model(path=str(model)), source, tmp_path)
    tokenizer.add_tokens([f"<more{k}>" for k in range(6)])
    tokenizer.save_pretrained(model)
    with pytest.raises(StageError, match=rf"the tokenizer has {tokens + 6} tokens, the model {tokens + 5} embeddings: use the tokenizer"):
        write_tokenizer(Model(path=str(model)), source, tmp_path)


def known(root: Path, **numbers: Any) -> tuple[Run, Stage]:
    """A run that knows these numbers of its base model."""
    run, base = Run(root), Stage("base/model", {})

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        (run.directory(base) / "source.json").write_text("{}")
        return {base.name: numbers}

    run.do(work, base)
    return run, base


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("self_attn.q_proj, v_proj", None),
        ("all-linear", None),
        ("all-linear, q_proj", "'all-linear' is every one of them"),
        ("q_proj, wqkv", "'wqkv' matches no module of the model; it has q_proj, v_proj"),
    ],
)
def test_targets_of_low_rank_adapters(targets: str, said: str | None, tmp_path: Path) -> None:
    run, base = known(tmp_path, context=512, modules=["q_proj", "v_proj"], shares_prompt=True, window=None)
    with pytest.raises(StageError, match=said) if said else contextlib.nullcontext():
        check(run, base, {"demonstrations.max_tokens": 64}, {"training": Training(lora_r=4, lora_targets=targets)})


def test_a_model_that_cannot_share_a_prompt_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, base = known(tmp_path, context=None, modules=[], shares_prompt=True, window=32)
    check(run, base, {"demonstrations.max_tokens": 32}, {})
    assert not caplog.records, "a window as long as the longest sequence hides nothing"
    check(run, base, {"demonstrations.max_tokens": 33, "evaluation": 40}, {})
    assert [record.message for record in caplog.records] == [
        "this model cannot share a prompt between responses: every response gets a row of its own, with the same loss"
    ]
