"""A policy's weights in and out of a training stage, as plain Hugging Face directories."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from actors.learner.attention import BRANCHING
from actors.learner.batches import shares_prompt
from actors.settings import Training

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(weights: str, precision: str, longest: int | None, trust_remote_code: bool) -> PreTrainedModel:
    """Loads a policy to train or score it. Dropout stays off: log ratios must start at 0.

    Args:
        weights: directory or hub id.
        precision: "float32" or "bfloat16".
        longest: no prompt with one of its responses is longer, tokens; see `shares_prompt`.
        trust_remote_code: run Python code that comes with the model.
    """
    config = AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    for key, value in text.to_dict().items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(text, key, 0.0)
    return AutoModelForCausalLM.from_pretrained(
        weights,
        config=config,
        dtype=DTYPES[precision],
        attn_implementation=BRANCHING if shares_prompt(config, longest) else "sdpa",
        trust_remote_code=trust_remote_code,
    )


def architecture(weights: str, settings: Training, trust_remote_code: bool) -> dict[str, Any]:
    """What tells policies apart whose checkpoints cannot be mixed up; no weight is read."""
    text = AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code).get_text_config()
    shape = {name: getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    return {"model_type": text.model_type, **shape, "lora_r": settings.lora_r}


def trainable(model: PreTrainedModel, settings: Training) -> PreTrainedModel:
    """Readies a policy for training: recomputed activations, low-rank adapters in place of its own weights.

    Raises:
        ValueError: `lora_targets` match no module.
    """
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.lora_r:
        # peft puts the adapters into the model itself; its own wrapper is of use for export only.
        _adapted(model, settings)
    return model


def _adapted(model: PreTrainedModel, settings: Training) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = settings.targets()
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    # In the model's own precision: DeepSpeed keeps float32 masters of what is trained.
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def export(engine: Any, settings: Training, weights: str, tokenizer: str, directory: Path, trust_remote_code: bool) -> None:
    """Writes the trained policy: safetensors, config, generation config, tokenizer and chat template.

    A collective: every worker takes part, the first one writes. Low-rank adapters are merged into the weights they were trained on,
    and kept in `adapter/` beside the policy.

    Args:
        engine: DeepSpeed's, around a `ResponseLogProbs`.
        settings: of the training stage.
        weights: the policy that training started from.
        tokenizer: directory of the run's tokenizer.
        directory: to write to.
        trust_remote_code: run Python code that comes with the model.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    model: PreTrainedModel = engine.module.model
    writes = dist.get_rank() == 0
    masters: dict[int, torch.Tensor] = {}
    for parameter in model.parameters():
        if settings.lora_r and not parameter.requires_grad:
            continue
        # None where the parameter is its own master copy.
        full = safe_get_full_fp32_param(parameter)
        if writes:
            masters[id(parameter)] = (parameter.detach() if full is None else full).to("cpu", torch.float32).clone()
    if writes:
        # Tied weights are one parameter under several names; transformers writes them once.
        state = {name: masters[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in masters}
        if settings.lora_r:
            model, state = _merged(weights, settings, state, directory.parent / "adapter", trust_remote_code)
        else:
            state |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in model.state_dict()}
        dtype = DTYPES[settings.save_precision]
        model.config.dtype = dtype
        model.save_pretrained(directory, state_dict={name: tensor.to(dtype) for name, tensor in state.items()})
        AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code).save_pretrained(directory)
        GenerationConfig.from_pretrained(tokenizer).save_pretrained(directory)
    dist.barrier()


def _merged(
    weights: str, settings: Training, adapter: dict[str, torch.Tensor], directory: Path, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The policy with its adapters merged, in float32 on the CPU; the adapters as peft writes them go to `directory`."""
    adapted = _adapted(load(weights, "float32", None, trust_remote_code), settings)
    missing = adapted.get_base_model().load_state_dict(adapter, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    adapted.peft_config["default"].base_model_name_or_path = weights
    adapted.save_pretrained(directory)
    merged = adapted.merge_and_unload()
    return merged, merged.state_dict()
