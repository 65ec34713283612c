"""The DeepSpeed JSON of a training stage: ours, with a user's own laid over it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.settings import Training

ELEMENTS_AT_ONCE = 30_000_000
"""That workers exchange. DeepSpeed's default of 500 million, meant for GPUs, holds a whole small model in one piece: 4.1 s a step
against 2.6 s (SmolLM2-135M, bfloat16, 8 rows of 85 tokens, two workers of one thread)."""
CPU_BUCKETS = {"reduce_bucket_size": ELEMENTS_AT_ONCE, "allgather_bucket_size": ELEMENTS_AT_ONCE}


def deepspeed_config(settings: Training, world: int, theirs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Builds the config that `deepspeed.initialize` gets.

    Args:
        settings: of the training stage.
        world: number of workers.
        theirs: what the user's own JSON (`settings.deepspeed`) says.

    Raises:
        ValueError: a key of the user's JSON contradicts the settings; both values are named.
    """
    ours: dict[str, Any] = {
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {"stage": settings.zero_stage} | (CPU_BUCKETS if settings.gpus_per_worker == 0 else {}),
        "bf16": {"enabled": settings.precision == "bfloat16"},
        # The optimizers are torch's, which DeepSpeed has not listed as tested with ZeRO.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if settings.offload:
        place = {"device": "cpu", "pin_memory": settings.gpus_per_worker > 0}
        ours["zero_optimization"] |= {"offload_optimizer": place} | ({"offload_param": place} if settings.zero_stage == 3 else {})
        ours["zero_force_ds_cpu_optimizer"] = settings.gpus_per_worker > 0 and settings.optimizer == "adamw"
    if settings.precision == "bfloat16":
        # Sums of bf16 gradients over workers lose small terms.
        ours["communication_data_type"] = "fp32"
        if settings.zero_stage == 1 and not settings.offload:
            # And so do sums over micro-batches. Each gradient goes into the float32 sum as soon as it is there.
            ours |= {"data_types": {"grad_accum_dtype": "fp32"}}
            ours["bf16"]["immediate_grad_update"] = True
    if theirs is not None:
        contradictions: list[str] = []
        ours = _overlaid(ours | {"train_batch_size": settings.batch_size}, theirs, settings, contradictions)
        if contradictions:
            raise ValueError(f"deepspeed={settings.deepspeed} says {'; '.join(contradictions)}")
    # The learner forms micro-batches by tokens and says itself where a step ends: to DeepSpeed every row is a micro-batch.
    return ours | {"train_batch_size": world, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


def read_deepspeed(path: str) -> dict[str, Any]:
    """Reads a user's DeepSpeed JSON.

    Raises:
        ValueError: the file is missing or is no JSON object.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"deepspeed={path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"deepspeed={path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"deepspeed={path} must hold a JSON object, not {type(config).__name__}")
    return config


INSTEAD = {
    "optimizer": ("optimizer", "learning_rate", "weight_decay"),
    "scheduler": ("schedule", "warmup_ratio"),
    "fp16": ("precision",),
    "amp": ("precision",),
    "torch_autocast": ("precision",),
    "data_types.param_dtype": ("precision",),
    # The name before "bf16", which DeepSpeed does not read where there is one.
    "bfloat16": ("precision",),
    "train_micro_batch_size_per_gpu": ("micro_batch_tokens",),
    "gradient_accumulation_steps": ("micro_batch_tokens",),
    # A step is the mean over the global batch, however many workers share it.
    "gradient_allreduce_op": ("batch_size",),
    "zero_optimization.offload_optimizer": ("offload",),
    "zero_optimization.offload_param": ("offload",),
    # The names before those two, which DeepSpeed still reads.
    "zero_optimization.cpu_offload": ("offload",),
    "zero_optimization.cpu_offload_param": ("offload",),
}
"""Keys of DeepSpeed that settings of ours replace."""

SETTING_OF_KEY = {
    "train_batch_size": "batch_size",
    "gradient_clipping": "max_grad_norm",
    "zero_optimization.stage": "zero_stage",
    "bf16.enabled": "precision",
}


def _agrees(key: str, value: Any, settings: Training) -> bool:
    """Whether the value of a key that settings of ours replace says the same as they do, or leaves it open."""
    if key.startswith("zero_optimization."):
        wanted = settings.offload and (not key.endswith("param") or settings.zero_stage == 3)
        off = "none" if value in (None, False) else value
        place = value.get("device", "none") if isinstance(value, Mapping) else "cpu" if value is True else off
        return place == ("cpu" if wanted else "none")
    if key == "gradient_allreduce_op":
        return str(value).lower() == "mean"
    if not isinstance(value, Mapping):
        return False
    if key == "optimizer":
        same = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        agree = all(number in ("auto", same.get(name)) for name, number in (value.get("params") or {}).items())
        return agree and str(value.get("type", "")).lower() == settings.optimizer
    if key == "bfloat16":
        return value in ({"enabled": "auto"}, {"enabled": settings.precision == "bfloat16"})
    return key in ("fp16", "amp", "torch_autocast") and value.get("enabled", False) in (False, "auto")


def _overlaid(
    ours: dict[str, Any], theirs: Mapping[str, Any], settings: Training, contradictions: list[str], prefix: str = ""
) -> dict[str, Any]:
    """Ours with what they add; what says otherwise than ours goes to `contradictions`."""

    def said(names: Sequence[str]) -> str:
        return ", ".join(f"{name}={getattr(settings, name)}" for name in names)

    result = dict(ours)
    for key, value in theirs.items():
        dotted = prefix + key
        if value == "auto":
            continue
        if dotted in INSTEAD and _agrees(dotted, value, settings):
            if isinstance(ours.get(key), dict) and isinstance(value, Mapping):
                # How it is offloaded is theirs to say.
                result[key] = ours[key] | {name: detail for name, detail in value.items() if detail != "auto"}
            continue
        if dotted in INSTEAD:
            contradictions.append(f"{dotted}={value!r}, the config says {said(INSTEAD[dotted])} (remove it from the JSON)")
        elif isinstance(ours.get(key), dict):
            if isinstance(value, dict):
                result[key] = _overlaid(ours[key], value, settings, contradictions, f"{dotted}.")
            else:
                contradictions.append(f"{dotted}={value!r}, which has to be an object such as {json.dumps(ours[key])}")
        elif dotted in SETTING_OF_KEY and value != ours.get(key):
            contradictions.append(f"{dotted}={value!r}, the config says {said([SETTING_OF_KEY[dotted]])} (make them agree)")
        else:
            result[key] = value
    return result
