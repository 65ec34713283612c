"""A model directory as others read it: file modes, facts in its config, names that transformers 4 knows."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def finish(directory: Path, facts: Mapping[str, Any]) -> None:
    """A model directory as others read it: facts stand in its config, transformers 4 finds what it knows by other names, and files can be
    read by whom the folder is for (safetensors' own are their owner's alone)."""
    for name, said, older in (("config.json", dict(facts), model_names), ("tokenizer_config.json", {}, tokenizer_names)):
        if (file := directory / name).exists():
            config = json.loads(file.read_text(encoding="utf-8")) | said
            file.write_text(json.dumps(config | older(config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    mask = os.umask(0)
    os.umask(mask)
    for path in directory.iterdir():
        path.chmod(0o666 & ~mask)


def model_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a model's config by which transformers 4 knows what transformers 5 writes; that reads both. Without them 4 would take its
    default for the base of rotary positions, and say nothing. Not of models with code of their own, nor of those whose layers have several
    kinds of positions, or whose config is made of configs: each of these has names of its own."""
    if "auto_map" in config:
        return {}
    found = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    rotary = dict(config.get("rope_parameters") or {})
    if "rope_theta" not in rotary:
        return found
    names = ("rotary_emb_base", "rotary_pct") if config.get("model_type") == "gpt_neox" else ("rope_theta", "partial_rotary_factor")
    values = rotary.pop("rope_theta"), rotary.pop("partial_rotary_factor", None)
    found |= {name: value for name, value in zip(names, values, strict=True) if value is not None}
    kind = rotary.get("rope_type", "default")
    if kind == "longrope":
        rotary = {"type": kind, **{name: rotary[name] for name in ("short_factor", "long_factor")}}
    return found | ({} if kind == "default" else {"rope_scaling": rotary})


def tokenizer_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a tokenizer's."""
    found: dict[str, Any] = {}
    if config.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
        # There it would also make token types, of which a language model wants nothing.
        found["model_input_names"] = config.get("model_input_names", ["input_ids", "attention_mask"])
    tokens = config.get("extra_special_tokens")
    # There it is a mapping of names that the tokenizer's class asks for.
    return found | ({"extra_special_tokens": {}, "additional_special_tokens": tokens} if isinstance(tokens, list) else {})
