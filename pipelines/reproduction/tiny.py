"""A language model small enough to be trained from scratch: a Llama with random weights and a tokenizer of characters and words.

base/model/blank/      plain Hugging Face directory: weights of seed 0, tokenizer, chat template
base/model/tokenizer/  the run's tokenizer, as for any base model
seed-1/blank/policy/   other random weights
"""

import string
from pathlib import Path
from typing import Any

from pipelines import base_model
from pipelines.reproduction.problems import ACTIONS, MARKER, MOVES, STYLES, TIMES, TURNS
from pipelines.reproduction.settings import Tiny
from pipelines.run.artifacts import Run, Stage, write_json
from pipelines.settings import Model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ '<answer>' if m['role'] == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<pad>", "<answer>", "<unknown>")


def words() -> list[str]:
    """Everything that is one token: the words of the problems and of the styles, and single characters."""
    styled = " ".join(part for style in STYLES.values() for part in style).replace("{0}", " ").split()
    known = [MARKER, *MOVES, *ACTIONS, *filter(None, TURNS), *filter(None, TIMES), "then", "after", *styled]
    return list(dict.fromkeys([*known, *string.digits, *string.ascii_letters, *"+-=;:,. "]))


def tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` of those tokens; text comes back from its ids unchanged."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*SPECIAL, *words()])}, unk_token="<unknown>"))
    longest_first = sorted((word for word in words() if len(word) > 1), key=len, reverse=True)
    core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*longest_first, r"[\s\S]"])), "isolated")
    core.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unknown>",
        extra_special_tokens=["<answer>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def write_model(tiny: Tiny, seed: int, directory: Path, with_tokenizer: bool = True) -> None:
    """Writes random weights as a plain Hugging Face directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=tiny.hidden_size,
        intermediate_size=4 * tiny.hidden_size,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.hidden_size // 32,
        num_key_value_heads=tiny.hidden_size // 32,
        max_position_embeddings=tiny.context,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    if with_tokenizer:
        words.save_pretrained(directory)


def plan(tiny: Tiny) -> Stage:
    """The stage that makes tokenizer and model; of a run its base model."""
    return Stage("base/model", tiny.identity() | {"words": [*SPECIAL, *words()], "template": TEMPLATE})


def prepare(tiny: Tiny) -> Any:
    """Returns the work of that stage."""

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        import ray

        (stage,) = stages
        # In a worker: the driver imports no torch.
        return {stage.name: ray.get(ray.remote(_prepare).remote(tiny, run.directory(stage)))}

    return work


def _prepare(tiny: Tiny, directory: Path) -> dict[str, Any]:
    blank = directory / "blank"
    write_model(tiny, 0, blank)
    write_json(directory / "source.json", {"weights": str(blank)})
    numbers = base_model.write_tokenizer(Model(path=str(blank)), {"pretrained_model_name_or_path": str(blank)}, directory)
    return numbers | {"parameters": parameters(blank)}


def parameters(directory: Path) -> int:
    """Number of weights of a model on disk."""
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    total = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        total += size
    return total


def plan_blank(name: str, base: Stage, seed: int) -> Stage:
    """The stage that draws other random weights."""
    return Stage(name, {"seed": seed}, {"base": base})


def draw_blanks(tiny: Tiny) -> Any:
    """Returns the work of such stages."""

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        import ray

        ray.get([ray.remote(write_model).remote(tiny, stage.settings["seed"], run.directory(stage) / "policy", False) for stage in stages])
        return {}

    return work
