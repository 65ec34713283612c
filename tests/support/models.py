"""Tiny random models with real tokenizers, written as plain Hugging Face directories."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Heads of 32: the smallest that vLLM's attention on a CPU takes.
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 300 tokens, with <s>, </s> and <pad>."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>", "[user]", "[assistant]", "[system]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["how many apples are there? there are 12 apples. #### 12"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = template
    return fast


def config(family: str, vocab_size: int) -> PreTrainedConfig:
    """A two-layer config of a family."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": vocab_size}
    if family == "gpt2":
        return GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=512, **ids)
    if family == "mistral_window":
        return MistralConfig(**SIZES, **ids, max_position_embeddings=512, sliding_window=8)
    if family == "gpt_neox":
        return GPTNeoXConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512, **ids
        )
    if family == "gemma":
        return GemmaConfig(**SIZES, **ids, head_dim=32, max_position_embeddings=512)
    if family == "bloom":
        return BloomConfig(hidden_size=64, n_layer=2, n_head=2, **ids)
    if family == "mamba":
        return MambaConfig(hidden_size=64, num_hidden_layers=2, state_size=8, **ids)
    if family == "qwen3":
        return Qwen3Config(**SIZES, **ids, head_dim=32, max_position_embeddings=512)
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig, "smollm3": SmolLM3Config}
    return kinds[family](**SIZES, **ids, max_position_embeddings=512)


def write_tiny(directory: Path, family: str = "llama", template: str | None = TEMPLATE, seed: int = 0, std: float = 0.02) -> Path:
    """Writes model and tokenizer to `directory` and returns it."""
    tok = tokenizer(template)
    torch.manual_seed(seed)
    shape = config(family, len(tok))
    shape.initializer_range = std
    AutoModelForCausalLM.from_config(shape).save_pretrained(directory)
    tok.save_pretrained(directory)
    return directory
