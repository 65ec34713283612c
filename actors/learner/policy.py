"""Weights in and out of a training stage, as plain Hugging Face directories: of a policy, or of a reward model."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from actors.learner import products
from actors.learner.attention import BRANCHING
from actors.learner.batches import shares_prompt
from actors.learner.directory import finish
from actors.learner.logprobs import ResponseLogProbs
from actors.learner.rewards import ResponseRewards
from actors.learner.rounding import stochastic
from actors.settings import Training


@dataclass(frozen=True)
class Kind:
    """What a model is for."""

    auto: Any
    """the class of transformers that loads it"""
    module: Any
    """the model as a function from a batch to numbers of its responses"""
    task: str
    """its name in peft"""


KINDS = {
    "policy": Kind(AutoModelForCausalLM, ResponseLogProbs, "CAUSAL_LM"),
    "reward": Kind(AutoModelForSequenceClassification, ResponseRewards, "SEQ_CLS"),
}
"""A policy gives log-probs of responses, a reward model one scalar each. The trained one is written to a directory of that name."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

PAD = "<|pad|>"
"""the token that tokenizers of reward models get where they have none to spare for padding"""
WHOLE = "{%- set whole +%}"
"""what chat templates of reward models begin with, see `ends_with_its_turn`"""


def load(
    weights: str, precision: str, longest: int | None, trust_remote_code: bool, kind: str = "policy", safetensors_only: bool = False
) -> PreTrainedModel:
    """Loads a model to train it or to score with it. Dropout stays off: log ratios must start at 0.

    Args:
        weights: directory or hub id.
        precision: "float32" or "bfloat16".
        longest: no prompt with one of its responses is longer, tokens; see `shares_prompt`.
        trust_remote_code: run Python code that comes with the model.
        kind: a key of KINDS. Of a policy's weights a reward model takes the body; its head is then drawn from torch's generator.
        safetensors_only: read no weights in other formats.
    """
    config = AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    if kind == "reward" and not is_classifier(config):
        config.num_labels = 1
    for key, value in text.to_dict().items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(text, key, 0.0)
    model: PreTrainedModel = KINDS[kind].auto.from_pretrained(
        weights,
        config=config,
        dtype=DTYPES[precision],
        attn_implementation=_attention(config, longest),
        trust_remote_code=trust_remote_code,
        use_safetensors=safetensors_only or None,
    )
    products.install(model)
    return model


def _attention(config: Any, longest: int | None) -> str | None:
    # Else each takes the best that it has: not every architecture knows SDPA.
    return BRANCHING if shares_prompt(config, longest) else None


def is_classifier(config: Any) -> bool:
    """Whether a config is that of a model with labels, as reward models are published."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def architecture(weights: str, settings: Training, trust_remote_code: bool) -> dict[str, Any]:
    """What tells policies apart whose checkpoints cannot be mixed up; no weight is read."""
    text = AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code).get_text_config()
    shape = {name: getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    return {"model_type": text.model_type, **shape, "lora_r": settings.lora_r}


def recomputes(model: PreTrainedModel) -> bool:
    """Whether a model's layers can compute their activations twice instead of keeping them."""
    return bool(model.supports_gradient_checkpointing)


def trainable(model: PreTrainedModel, settings: Training, kind: str = "policy") -> PreTrainedModel:
    """Readies a model for training: recomputed activations, low-rank adapters in place of its own weights.

    Raises:
        ValueError: `lora_targets` match no module.
    """
    if settings.gradient_checkpointing is True or (settings.gradient_checkpointing == "auto" and recomputes(model)):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.lora_r:
        # peft puts the adapters into the model itself; its own wrapper is of use for export only.
        _adapted(model, settings, kind)
    return model


def _adapted(model: PreTrainedModel, settings: Training, kind: str) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = settings.targets()
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type=KINDS[kind].task,
    )
    # In the model's own precision: DeepSpeed keeps float32 masters of what is trained.
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def export(
    engine: Any,
    settings: Training,
    weights: str,
    tokenizer: str,
    directory: Path,
    trust_remote_code: bool,
    kind: str = "policy",
    facts: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Writes the trained model: safetensors, config, tokenizer and chat template, and a policy's generation config.

    A collective: every worker takes part, the first one writes. Low-rank adapters are merged into the weights they were trained on,
    and kept in `adapter/` beside the policy.

    Args:
        engine: DeepSpeed's, around the module of the kind.
        settings: of the training stage.
        weights: those that training started from.
        tokenizer: directory of the run's tokenizer.
        directory: to write to.
        trust_remote_code: run Python code that comes with the model.
        kind: a key of KINDS.
        facts: added to the model's config.

    Returns:
        on the worker that wrote: `digests` of the weights.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    model: PreTrainedModel = engine.module.model
    writes = dist.get_rank() == 0
    masters: dict[int, torch.Tensor] = {}
    written: dict[str, int] = {}
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
        draws = settings.seed
        if settings.lora_r:
            # As the forward pass had them, and other draws for every training.
            state = {name: tensor.to(DTYPES[settings.precision]).float() for name, tensor in state.items()}
            draws = xxhash.xxh3_64_intdigest(json.dumps([settings.seed, digests(state)]).encode()) >> 1
            model, state = _merged(weights, settings, state, directory.parent / "adapter", trust_remote_code, kind)
        else:
            state |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in model.state_dict()}
        # As it was trained, sampled and measured: of the master weights a reader would get a policy that nobody looked at.
        state = _rounded(state, settings, draws, model.all_tied_weights_keys)
        words = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
        if kind == "policy":
            GenerationConfig.from_pretrained(tokenizer).save_pretrained(directory)
        else:
            state = _pad_apart(model, words, state, _ends(tokenizer, words))
            named = words.chat_template
            words.chat_template = (
                {name: ends_with_its_turn(text) for name, text in named.items()} if isinstance(named, dict) else ends_with_its_turn(named)
            )
        # transformers takes the second names of tied weights out of it.
        written = digests(state)
        model.save_pretrained(directory, state_dict=state)
        words.save_pretrained(directory)
        # The precision of the weights on disk, not of those in training.
        finish(directory, {"dtype": settings.precision, **(facts or {})})
    dist.barrier()
    return written


def _rounded(state: dict[str, torch.Tensor], settings: Training, draws: int, tied: Collection[str]) -> dict[str, torch.Tensor]:
    """Weights in the precision that they are saved in. A full training computes with the nearest ones; adapters are merged afterwards, by
    the seed `draws`. Names that the model declares as `tied` stay one tensor with what they are tied to, and are once on disk."""
    draw, merged = torch.Generator().manual_seed(draws), settings.lora_r and settings.precision == "bfloat16"
    done: dict[tuple[Any, ...], torch.Tensor] = {}

    found = {}
    for name, tensor in state.items():
        place = tensor.data_ptr(), tensor.shape
        if place not in done:
            rounded = stochastic(tensor, draw) if merged and tensor.dtype == torch.float32 else tensor
            found[name] = done[place] = rounded if merged else tensor.to(DTYPES[settings.precision])
        else:
            # transformers writes no tensor under two names unless the model says that it reads one of them back.
            found[name] = done[place] if name in tied else done[place].clone()
    return found


def digests(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """What tells weights apart to the bit, by name."""
    flat = {name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for name, tensor in state.items()}
    return {name: xxhash.xxh3_64_intdigest(data.data) for name, data in flat.items()}


def _merged(
    weights: str, settings: Training, adapter: dict[str, torch.Tensor], directory: Path, trust_remote_code: bool, kind: str
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The model with its adapters merged, in float32 on the CPU; the adapters as peft writes them go to `directory`."""
    # The weights beside which the adapters were trained, to the bit.
    adapted = _adapted(load(weights, settings.precision, None, trust_remote_code, kind).float(), settings, kind)
    missing = adapted.get_base_model().load_state_dict(adapter, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    adapted.peft_config["default"].base_model_name_or_path = weights
    adapted.save_pretrained(directory)
    merged = adapted.merge_and_unload()
    return merged, merged.state_dict()


def ends_with_its_turn(template: str) -> str:
    """A chat template without the white space that many write behind the last turn: whoever renders a whole conversation then reads the
    reward where it was trained, at the token that ends the response."""
    # The plus signs, and the newline that Jinja drops at the end of a template, keep its own white space as it was.
    body = template.removesuffix("\n")
    return f"{WHOLE}{body}{{%+ endset %}}{{{{ whole if add_generation_prompt else whole.rstrip() }}}}"


def _ends(directory: str, tokenizer: Any) -> list[str]:
    """Tokens that a model declares to end its responses, also beside the tokenizer's own."""
    try:
        ids = GenerationConfig.from_pretrained(directory).eos_token_id
    except OSError:
        return []
    return [tokenizer.convert_ids_to_tokens(token) for token in ([ids] if isinstance(ids, int) else ids or [])]


def _pad_apart(model: PreTrainedModel, tokenizer: Any, state: dict[str, torch.Tensor], ends: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Gives tokenizer and config a padding token that ends no response: transformers reads the reward at the last token that is not
    padding, and with pad == EOS would read it one too early.

    Args:
        model: the reward model.
        tokenizer: of its policy.
        state: its weights.
        ends: tokens that end a response beside the tokenizer's EOS.

    Returns:
        the weights, with a row for the token where the vocabulary had none to spare.
    """
    taken = {tokenizer.eos_token, tokenizer.bos_token, *ends}
    text = model.config.get_text_config()
    template = str(tokenizer.chat_template or "")
    if tokenizer.pad_token is None or tokenizer.pad_token in taken or tokenizer.pad_token in template:
        spare = [token for token in tokenizer.all_special_tokens if token not in taken and token not in template]
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else PAD})
    missing = len(tokenizer) - text.vocab_size
    if missing > 0:
        table = model.get_input_embeddings().weight
        name = next(name for name, parameter in model.named_parameters() if parameter is table)
        state = state | {name: torch.cat([state[name], state[name].new_zeros(missing, state[name].shape[1])])}
        text.vocab_size = len(tokenizer)
    text.pad_token_id = tokenizer.pad_token_id
    return state
