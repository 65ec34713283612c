"""The process that holds a policy or a judge, as Ray Serve runs it: prompts in, responses out."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from actors.batching import Turns
from actors.loading import loading
from actors.settings import Engine
from pipelines.chat import Chat
from pipelines.serving.prompts import About, Conversation, Prompt, checked, conversations, field_of, identity, is_ids, templated
from pipelines.serving.refusal import Refused


@dataclass(frozen=True)
class Draw:
    """How responses are sampled."""

    n: int
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    stop: tuple[str, ...]
    seed: int | None
    max_tokens: int | None
    """all that the context leaves room for, where it is None"""
    limit: str = "max_tokens"
    """what the request calls it"""
    top_logprobs: int | None = None
    """give the log-probs of the tokens, and of so many others at their places; None: none"""


@dataclass(frozen=True)
class Token:
    """A token of a response."""

    text: str
    logp: float
    """nats, before temperature and nucleus"""
    likeliest: tuple[tuple[str, float], ...]
    """the likeliest tokens at its place with their log-probs"""


@dataclass(frozen=True)
class Sample:
    """A response, or the next piece of one."""

    text: str
    ids: list[int]
    """its tokens, with the one that ended it"""
    finish_reason: str | None
    """"stop" or "length"; None before the end"""
    exact: bool = True
    """whether the tokens say the same as the text: words that end a response are in the one and not in the other"""
    tokens: tuple[Token, ...] | None = None
    """with their log-probs, where these are asked for"""


@dataclass(frozen=True)
class Samples:
    """Responses to a prompt."""

    prompt_ids: list[int]
    samples: list[Sample]


@dataclass(frozen=True)
class Labels:
    """How likely words are as the start of a response."""

    prompt_ids: list[int]
    logps: list[float]
    """of each, among each other"""


class PolicyReplica:
    """A policy, or a judge, in a vLLM engine.

    Args:
        name: in requests.
        weights: its directory or hub id.
        engine: settings.
        max_model_len: longest prompt and response together, tokens; less where the model has less.
        max_new_tokens: of a response whose request names no limit, at most.
        trust_remote_code: run Python code that comes with the model.
        safetensors_only: read no weights in other formats.
    """

    @loading()
    def __init__(
        self,
        name: str,
        weights: str,
        engine: Engine,
        max_model_len: int,
        max_new_tokens: int,
        trust_remote_code: bool = False,
        safetensors_only: bool = False,
    ):
        from transformers import AutoConfig

        from actors.engine_loop import EngineLoop, end_process
        from actors.generator import policy_engine, room

        max_model_len = room(AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code), max_model_len)
        self.chat = Chat(weights, trust_remote_code)
        llm = policy_engine(weights, engine, max_model_len, trust_remote_code, text=True, safetensors_only=safetensors_only)
        self.vocabulary = llm.llm_engine.model_config.get_vocab_size()
        self.loop = EngineLoop(llm.llm_engine, died=end_process)
        # In a step with log-probs of labels vLLM's runner on CPUs forgets what others asked for: the likeliest tokens.
        self.turns = Turns()
        self.takes_seeds = engine.num_gpus > 0
        self.max_new_tokens = max_new_tokens
        self._about = About(name, max_model_len, identity(self.chat), chat=conversations(self.chat))

    async def about(self) -> About:
        """The model."""
        return self._about

    async def check_health(self) -> None:
        """Ray Serve asks; an error starts another process."""
        self.loop.check()

    async def sample(self, prompt: Prompt, draw: Draw) -> Samples:
        """Responses to a prompt.

        Raises:
            Refused: the prompt is empty or too long, or refused by the chat template.
        """
        from vllm.sampling_params import RequestOutputKind

        ids = await asyncio.to_thread(self._prompt_ids, prompt)
        async with self.turns.of("likeliest" if draw.top_logprobs else None):
            async for output in self._outputs(ids, draw, RequestOutputKind.FINAL_ONLY):
                return Samples(ids, [_sample(found, draw) for found in sorted(output.outputs, key=lambda found: found.index)])
        raise AssertionError("an engine gives an output at the end")

    async def stream(self, prompt: Prompt, draw: Draw) -> AsyncIterator[Samples]:
        """One response, piece by piece.

        Raises:
            Refused: the prompt is empty or too long, or refused by the chat template.
        """
        from vllm.sampling_params import RequestOutputKind

        ids = await asyncio.to_thread(self._prompt_ids, prompt)
        async for output in self._outputs(ids, draw, RequestOutputKind.DELTA):
            yield Samples(ids, [_sample(output.outputs[0], draw)])

    async def label_logps(self, prompt: Prompt, labels: Sequence[str]) -> Labels:
        """Log-probs of words as the start of the response, among each other, by their first tokens.

        Raises:
            Refused: the prompt is too long, or two words start with the same token.
        """
        from actors.judge.engine import label_logps, label_params

        ids = await asyncio.to_thread(self._prompt_ids, prompt)
        firsts = [self.chat.tokenizer(label, add_special_tokens=False).input_ids[0] for label in labels]
        if len(set(firsts)) < len(firsts):
            raise Refused(422, f"the labels {', '.join(labels)} start with the same token of this judge: use mode=text", "mode")
        async with self.turns.of("labels"):
            async for output in self.loop.outputs(ids, label_params(firsts)):
                return Labels(ids, label_logps(output.outputs[0], firsts))
        raise AssertionError("an engine gives an output at the end")

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            ids = self.chat.text_ids(prompt)
        elif is_ids(prompt):
            ids = cast(list[int], prompt)
        else:
            ids = templated(lambda: self.chat.prompt_ids(cast(Conversation, prompt)))
        # One token is left for the response.
        return checked(ids, "the prompt", field_of(prompt), self._about.context - 1, self.vocabulary)

    async def _outputs(self, ids: list[int], draw: Draw, kind: Any) -> AsyncIterator[Any]:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        room = self._about.context - len(ids)
        if draw.max_tokens and draw.max_tokens > room:
            raise Refused(
                422, f"{draw.limit}={draw.max_tokens}: the prompt's {len(ids)} tokens leave {room} of {self._about.context}", draw.limit
            )
        if draw.seed is not None and draw.temperature and not self.takes_seeds:
            raise Refused(422, "seed: this engine runs on a CPU and cannot take a seed a request: leave it out", "seed")
        try:
            params = SamplingParams(
                n=draw.n,
                temperature=draw.temperature,
                top_p=draw.top_p if draw.temperature else 1.0,
                presence_penalty=draw.presence_penalty,
                frequency_penalty=draw.frequency_penalty,
                max_tokens=draw.max_tokens or min(room, self.max_new_tokens),
                stop=list(draw.stop),
                stop_token_ids=self.chat.stop_ids,
                seed=draw.seed if self.takes_seeds else None,
                logprobs=draw.top_logprobs,
                output_kind=kind,
            )
            async for output in self.loop.outputs(ids, params):
                yield output
        except (ValueError, VLLMClientError) as error:
            raise Refused(422, str(error)) from None


def _sample(found: Any, draw: Draw) -> Sample:
    tokens = None
    if draw.top_logprobs is not None:
        tokens = tuple(_token(number, at, draw.top_logprobs) for number, at in zip(found.token_ids, found.logprobs, strict=True))
    return Sample(found.text, list(found.token_ids), found.finish_reason, not isinstance(found.stop_reason, str), tokens)


def _token(number: int, at: Mapping[int, Any], likeliest: int) -> Token:
    """A token out of vLLM's log-probs at its place, by token."""
    # JSON has no infinity.
    said = {token: (found.decoded_token or "", max(found.logprob, -9999.0)) for token, found in at.items()}
    first = sorted(at, key=lambda token: at[token].rank)[:likeliest]
    return Token(*said[number], tuple(said[token] for token in first))
