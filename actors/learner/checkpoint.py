"""Weights in and out of a training stage, as plain Hugging Face directories."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from actors.settings import Training

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(weights: str, settings: Training, trust_remote_code: bool) -> PreTrainedModel:
    """Loads a policy to train it. Attention takes an explicit mask, dropout stays off (log ratios must start at 0)."""
    config = AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    for key, value in text.to_dict().items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(text, key, 0.0)
    model = AutoModelForCausalLM.from_pretrained(
        weights,
        config=config,
        dtype=DTYPES[settings.precision],
        attn_implementation="sdpa",
        trust_remote_code=trust_remote_code,
    )
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def export(engine: Any, settings: Training, tokenizer: str, directory: Path) -> None:
    """Writes the trained policy: safetensors, config, generation config, tokenizer and chat template.

    A collective: every worker takes part, the first one writes.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    model: PreTrainedModel = engine.module.model
    dtype = DTYPES[settings.save_precision]
    writes = dist.get_rank() == 0
    masters: dict[int, torch.Tensor] = {}
    for parameter in model.parameters():
        # None where the parameter is its own master copy.
        full = safe_get_full_fp32_param(parameter)
        if writes:
            masters[id(parameter)] = (parameter.detach() if full is None else full).to("cpu", dtype).clone()
    if writes:
        # Tied weights are one parameter under several names; transformers writes them once.
        state = {name: masters[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
        state |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in model.state_dict()}
        model.config.dtype = dtype
        model.save_pretrained(directory, state_dict=state)
        saved_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        saved_tokenizer.save_pretrained(directory)
        generation = GenerationConfig.from_pretrained(tokenizer)
        generation.save_pretrained(directory)
    dist.barrier()
