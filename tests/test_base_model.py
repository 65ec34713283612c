"""A model that is not whole is named before anything loads it."""

import json
import shutil
from pathlib import Path

import pytest

from pipelines.artifacts import StageError
from pipelines.base_model import convert


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
