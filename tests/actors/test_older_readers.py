"""Models for those that read with transformers 4 (reward-bench, say): its own names are there, and transformers 5 reads the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Phi3Config

from actors.learner.directory import finish

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def written(config: Any, directory: Path) -> dict[str, Any]:
    """A random model of this config, finished; returns its config's JSON."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    finish(directory, {"dtype": "float32"})
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("scaling", [None, YARN, LLAMA3], ids=["plain", "yarn", "llama3"])
def test_rotary_positions_have_their_base_and_their_scaling(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    rotary = {"rope_theta": 70_000.0, **(scaling or {"rope_type": "default"})}
    said = written(LlamaConfig(**SMALL, rope_parameters=rotary), tmp_path)
    assert said["rope_theta"] == 70_000.0 and said["torch_dtype"] == said["dtype"] == "float32"
    assert said.get("rope_scaling") == scaling
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters == rotary
    # And a training that begins with this model writes the same again.
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert written(model.config, tmp_path / "again") == said | {"architectures": ["LlamaForCausalLM"]}


def test_models_with_other_rotary_positions_are_read_as_they_were(tmp_path: Path) -> None:
    part = Phi3Config(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5})
    said = written(part, tmp_path / "part")
    assert (said["rope_theta"], said["partial_rotary_factor"]) == (5e5, 0.5)
    layers = {name: {"rope_type": "default", "rope_theta": base} for name, base in (("full_attention", 1e6), ("sliding_attention", 1e4))}
    assert "rope_theta" not in written(Gemma3TextConfig(**SMALL, head_dim=16, rope_parameters=layers), tmp_path / "layers")
    neox = GPTNeoXConfig(
        **{**SMALL, "num_key_value_heads": 2}, rope_parameters={"rope_type": "default", "rope_theta": 4e4, "partial_rotary_factor": 0.5}
    )
    said = written(neox, tmp_path / "neox")
    assert (said["rotary_emb_base"], said["rotary_pct"]) == (4e4, 0.5)
    long = Phi3Config(**SMALL, original_max_position_embeddings=32, rope_parameters={"rope_theta": 1e4, **LONG})
    said = written(long, tmp_path / "long")
    assert said["rope_scaling"] == {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    assert AutoConfig.from_pretrained(tmp_path / "long").rope_parameters == long.rope_parameters | {"type": "longrope"}
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text('{"auto_map": {}, "dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e4}}')
    finish(own, {})
    assert set(json.loads((own / "config.json").read_text())) == {"auto_map", "dtype", "rope_parameters"}, "its code has names of its own"
    ids = torch.arange(24)[None]
    for name, config in (
        ("part", part),
        ("neox", neox),
        ("long", long),
        ("layers", Gemma3TextConfig(**SMALL, head_dim=16, rope_parameters=layers)),
    ):
        torch.manual_seed(0)
        before, after = AutoModelForCausalLM.from_config(config).eval(), AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            assert torch.equal(before(ids).logits, after(ids).logits), name


def test_a_tokenizer_has_a_class_and_tokens_that_are_known_there(tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(write_tiny(tmp_path / "tiny"))
    words.add_special_tokens({"extra_special_tokens": ["<|one|>", "<|two|>"]})
    words.save_pretrained(tmp_path / "tiny")
    finish(tmp_path / "tiny", {})
    said = json.loads((tmp_path / "tiny/tokenizer_config.json").read_text())
    assert (said["tokenizer_class"], said["model_input_names"]) == ("PreTrainedTokenizerFast", ["input_ids", "attention_mask"])
    assert (said["extra_special_tokens"], said["additional_special_tokens"]) == ({}, ["<|one|>", "<|two|>"])
    read = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert read("3<|two|>")["input_ids"] == words("3<|two|>")["input_ids"] and read.all_special_ids == words.all_special_ids
