"""The base policy: finds the model, gives it one tokenizer with one chat template for the whole run.

base/tokenizer/   tokenizer, chat template and generation config of every policy of the run
base/policy/      weights, only where the source is a GGUF file; else the source is read in place
base/source.json  {"weights": where they are}
"""

import contextlib
import functools
import importlib.util
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.loading import loading
from actors.settings import Training
from pipelines.chat import PLAIN_TEMPLATE, Chat
from pipelines.run.artifacts import Run, Stage, StageError, Work, write_json
from pipelines.run.keeping import Need
from pipelines.run.policies import require_intact
from pipelines.settings import Model

log = logging.getLogger(__name__)


def plan(model: Model, name: str = "base/model") -> Stage:
    """The stage that readies a model, of a run its base model.

    Raises:
        StageError: a local model is not there, or is a file of another kind.
    """
    if model.path.startswith((".", "/", "~")) and not Path(model.path).expanduser().exists():
        raise StageError(f"the model {model.path!r}: there is no such directory")
    if Path(model.path).expanduser().is_file() and not model.path.endswith(".gguf"):
        raise StageError(f"the model {model.path!r} is a file, not a model directory: name the directory, or a file that ends in .gguf")
    settings = model.identity() | {"files": files(model.path)}
    if model.chat_template:
        settings["chat_template"] = _template(model.chat_template)
    return Stage(name, settings, demand="2 x (1 CPU, 0 GPU)", version=3)


def files(path: str) -> dict[str, list[int]]:
    """Size and time of change of every file of a local model: an edited model is another one. Of a package the size alone, which is the
    same wherever it is installed; nothing for a hub id."""
    if path.startswith("package:"):
        file = gguf_file(path)
        return {file.name: [file.stat().st_size]} if file else {}
    place = Path(path)
    files = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place] if place.is_file() else []
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def check_tokens(run: Run, sampled: Stage, model: Stage, instead: str) -> None:
    """Token ids mean something for the tokenizer alone that made them.

    Args:
        run: the run.
        sampled: the model whose ids another one is to read.
        model: that one.
        instead: what a person may do.

    Raises:
        StageError: their tokenizers differ.
    """
    ours, theirs = (Path(tokenizer(run, base), "tokenizer.json") for base in (sampled, model))
    if ours.exists() and theirs.exists() and ours.read_bytes() != theirs.read_bytes():
        raise StageError(f"{model.name} and {sampled.name} have different tokenizers, and one is to read what the other wrote: {instead}")


def check(run: Run, base: Stage, longest: dict[str, int], trainings: dict[str, Training]) -> None:
    """Stops before an engine or a worker would find out that settings do not fit the model.

    Args:
        run: the run.
        base: the base model's finished stage.
        longest: longest sequence in tokens, by the settings that ask for it.
        trainings: training settings by section.

    Raises:
        StageError: a sequence is longer than the model's context, or LoRA targets match none of its modules.
    """
    numbers = run.numbers(base)
    if not numbers["shares_prompt"] or (numbers["window"] or max(longest.values())) < max(longest.values()):
        log.warning("this model cannot share a prompt between responses: every response gets a row of its own, with the same loss")
    for settings, tokens in longest.items():
        if numbers["context"] is not None and tokens > numbers["context"]:
            raise StageError(f"{settings} = {tokens} tokens, but the context of the model is {numbers['context']}: lower what asks for it")
    for section, training in trainings.items():
        targets = training.targets() if training.lora_r else []
        if "all-linear" in targets and len(targets) > 1:
            raise StageError(f"{section}.lora_targets: 'all-linear' is every one of them: leave the others out")
        for target in targets:
            # A path such as self_attn.q_proj ends in the module's name.
            if target.rpartition(".")[2] not in ("all-linear", *numbers["modules"]):
                raise StageError(
                    f"{section}.lora_targets: {target!r} matches no module of the model; it has {', '.join(numbers['modules'])}"
                )


def weights(run: Run, stage: Stage) -> str:
    """Directory or hub id of a policy's weights, for any stage that holds a policy."""
    source = run.directory(stage) / "source.json"
    return json.loads(source.read_text())["weights"] if source.exists() else str(run.directory(stage) / "policy")


def tokenizer(run: Run, base: Stage) -> str:
    """Directory of the run's tokenizer."""
    return str(run.directory(base) / "tokenizer")


def prepare(model: Model) -> Work:
    """Returns the work of the stage: resolve the source, write the tokenizer, convert a GGUF."""

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        import ray

        # In workers: the driver never loads a model, nor the libraries for one. Tokenizer and weights at the same time.
        resolved = model.model_copy(update={"chat_template": stages[0].settings["chat_template"]})
        path, directory = absolute(model.path), run.directory(stages[0])
        require_intact(path)
        run.keeper.make_room(Need(2, cpus=1))
        numbers, _ = ray.get([ray.remote(tokenize).remote(resolved, path, directory), ray.remote(convert).remote(path, directory)])
        if numbers["plain_chat_template"]:
            # Said here: what a worker logs does not reach the job's log.
            log.warning("%s has no chat template: a plain one is used (User: ... Assistant: ...)", model.path)
        return {stages[0].name: numbers}

    return work


@contextlib.contextmanager
def _reading_once() -> Iterator[None]:
    """For every question to a GGUF file transformers parses its head anew, and for every module it makes the table of all tensors' names:
    seconds each time."""
    import gguf

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, made in slow.items():
        setattr(gguf, name, functools.cache(made))
    try:
        yield
    finally:
        for name, made in slow.items():
            setattr(gguf, name, made)


@loading()
@_reading_once()
def tokenize(model: Model, path: str, directory: Path) -> dict[str, Any]:
    """Writes the tokenizer of the model at `path`; see `write_tokenizer`."""
    gguf = gguf_file(path)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent) if gguf else path}
    extra = {"gguf_file": gguf.name} if gguf else {"trust_remote_code": model.trust_remote_code}
    return write_tokenizer(model, source | extra, directory)


def write_tokenizer(model: Model, source: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Writes the run's tokenizer to `directory / "tokenizer"`.

    Args:
        model: settings; a chat template is text here.
        source: arguments of `from_pretrained`.
        directory: of the stage.

    Returns:
        whether the plain template was taken, the tokens that end a response, the model's context in tokens (None: no limit known), the
        names of its linear modules, whether responses can share their prompt, and the window in tokens up to which (None: any length).

    Raises:
        StageError: the model cannot be loaded, or lacks an embedding for a token.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from actors.learner.batches import shares_prompt

    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        config = AutoConfig.from_pretrained(**source)
        skeleton = _skeleton(config, model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise StageError(f"the model {model.path!r} cannot be loaded: {' '.join(str(error).split()) or type(error).__name__}") from None
    # Special tokens that nobody uses may lack one: a padding token, the image tokens of a model of text.
    words = set(tokenizer.get_vocab().values()) - {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    tokens = max(words | set(filter(None, (tokenizer.bos_token_id, tokenizer.eos_token_id)))) + 1
    embeddings = _embeddings(skeleton)
    if embeddings is None:
        log.info("the code of %s does not say how many tokens it embeds: its tokenizer is taken as it is", model.path)
    elif tokens > embeddings:
        raise StageError(
            f"the model {model.path!r}: the tokenizer has {tokens} tokens, the model {embeddings} embeddings: "
            "use the tokenizer that the model was trained with, or give the model an embedding for every token, be it used or not"
        )
    if model.chat_template:
        tokenizer.chat_template = model.chat_template
    plain = tokenizer.chat_template is None
    if plain:
        tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.save_pretrained(directory / "tokenizer")
    chat = Chat(str(directory / "tokenizer"), model.trust_remote_code)
    try:
        generation = GenerationConfig.from_pretrained(source["pretrained_model_name_or_path"])
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    try:
        generation.validate(strict=True)
    except ValueError:
        # A model's habits of sampling may contradict each other, and then cannot be saved; the tokens stay.
        tokens = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = GenerationConfig(**tokens)
    declared = generation.eos_token_id
    generation.eos_token_id = sorted({*chat.stop_ids, *(declared if isinstance(declared, list) else [declared])} - {None})
    generation.save_pretrained(directory / "tokenizer")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    found = {"plain_chat_template": plain, "stop_ids": generation.eos_token_id, "context": context, "modules": _linear_modules(skeleton)}
    window = getattr(config.get_text_config(), "sliding_window", None)
    return found | {"shares_prompt": shares_prompt(config, 1), "window": window if not shares_prompt(config) else None}


def _skeleton(config: Any, trust_remote_code: bool) -> Any:
    """The model without a weight."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _embeddings(model: Any) -> int | None:
    """How many tokens a model embeds; None where code of its own does not say which module does so."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except NotImplementedError:
        return None


def _linear_modules(model: Any) -> list[str]:
    """Last names of the modules that can get a low-rank adapter."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return sorted(
        {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head}
    )


@loading()
@_reading_once()
def convert(path: str, directory: Path) -> None:
    """Writes where the weights are, and those of a GGUF file as a plain Hugging Face directory in float32.

    Raises:
        StageError: a directory has no weights, or not all of them.
    """
    gguf = gguf_file(path)
    if not gguf and Path(path).is_dir():
        _check_weights(Path(path))
    write_json(directory / "source.json", {"weights": str(directory / "policy") if gguf else path})
    if not gguf:
        return
    import torch
    from transformers import AutoModelForCausalLM

    from actors.learner.directory import finish

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = loaded.config.to_dict()
    # transformers refuses to save what it read from a GGUF; a model of the same config with the same weights it saves.
    config.pop("quantization_config", None)
    with torch.device("meta"):
        clean = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(config))
    clean.load_state_dict(loaded.state_dict(), assign=True)
    clean.tie_weights()
    clean.save_pretrained(directory / "policy")
    finish(directory / "policy", {})


def _check_weights(directory: Path) -> None:
    """Reads heads of files alone: an engine or a worker would find out as well, after minutes and in words of its own."""
    from safetensors import SafetensorError, safe_open

    found = sorted(directory.glob("*.safetensors"))
    if not found and not [*directory.glob("*.bin"), *directory.glob("*.pt")]:
        raise StageError(f"{directory} holds no weights of a model: there is no .safetensors file in it")
    for file in found:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise StageError(f"{file} is damaged or was cut off ({error}): copy it again") from None
    for index in directory.glob("*.safetensors.index.json"):
        missing = sorted(set(json.loads(index.read_text())["weight_map"].values()) - {file.name for file in found})
        if missing:
            raise StageError(f"{directory} lacks {', '.join(missing)}, which {index.name} names: copy them too")


def gguf_file(path: str) -> Path | None:
    """The GGUF file that `model.path` names, or None if it names something else.

    Raises:
        StageError: there is no such file or package.
    """
    if path.startswith("package:"):
        package = path.removeprefix("package:")
        spec = importlib.util.find_spec(package)
        folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
        found = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
        if not found:
            raise StageError(f"the model {path!r}: no installed Python package {package!r} with a .gguf file in it")
        return found[0]
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise StageError(f"the model {path!r}: there is no such file")
        return Path(path)
    return None


def absolute(path: str) -> str:
    """Workers run elsewhere: a local path is named in full, a hub id stays."""
    return str(Path(path).resolve()) if Path(path).exists() or path.endswith(".gguf") else path


def _template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise StageError(f"model.chat_template={path!r}: {error.strerror}") from None
