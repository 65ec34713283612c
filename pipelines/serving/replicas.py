"""The processes that hold a model, as Ray Serve runs them: conversations and texts in, rewards or responses out."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from actors.batching import Batcher
from actors.settings import Engine, RewardScoring
from pipelines.chat import Chat
from pipelines.serving.refusal import Refused

Conversation = list[dict[str, str]]
Prompt = Conversation | str | list[int]
"""messages, a bare text, or token ids"""
BROKEN = 3
"""batches that fail one after the other before a replica is started anew"""


@dataclass(frozen=True)
class Answered:
    """A response to a conversation, to be rewarded."""

    messages: Conversation
    response: str
    ended: bool = True
    """false for a response that was cut"""


@dataclass(frozen=True)
class Rewards:
    """What a reward model says."""

    values: list[float]
    """one an item, raw"""
    tokens: list[int]
    """read for each"""


@dataclass(frozen=True)
class About:
    """What the gateway has to know of a model."""

    name: str
    context: int
    """tokens"""
    tokenizer: str
    """the same for models that read the same tokens by the same template"""
    centre: tuple[float, float] | None = None
    """mean and standard deviation of a reward model's rewards, where they are stored"""


class RewardReplica:
    """A reward model.

    Args:
        name: in requests.
        weights: its directory or hub id.
        scoring: settings of its processes.
        precision: of the forward pass.
        longest: no conversation is longer, tokens.
        trust_remote_code: run Python code that comes with the model.
    """

    def __init__(self, name: str, weights: str, scoring: RewardScoring, precision: str, longest: int, trust_remote_code: bool = False):
        from transformers import AutoConfig

        from actors import reward_engine

        self.model, context = reward_engine.load(weights, scoring, precision, longest, trust_remote_code)
        self.chat = Chat(weights, trust_remote_code)
        config = AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code)
        self.vocabulary = config.get_text_config().vocab_size
        centre = (config.reward_mean, config.reward_std or 1.0) if hasattr(config, "reward_mean") else None
        self._about = About(name, min(context, longest), identity(self.chat), centre)
        self.batcher = Batcher(self._values, scoring.max_batch_tokens)
        self.failures = 0

    async def about(self) -> About:
        """The model."""
        return self._about

    async def check_health(self) -> None:
        """Ray Serve asks; an error starts another process."""
        if self.failures >= BROKEN:
            raise RuntimeError(f"{self.failures} batches in a row failed")

    async def rewards(self, items: Sequence[Answered | Prompt]) -> Rewards:
        """Raw rewards.

        Args:
            items: responses to conversations; conversations that end in the assistant's turn; texts; or token ids.

        Raises:
            Refused: an item is empty, too long, or refused by the chat template.
        """
        sequences = await asyncio.to_thread(self._tokenize, items)
        return Rewards(await self.batcher(sequences), [len(ids) for ids in sequences])

    def _values(self, sequences: list[tuple[int, ...]]) -> list[float]:
        from actors.learner.batches import Example

        try:
            values = [value for (value,) in self.model([Example("", ids[:-1], (ids[-1:],)) for ids in sequences])]
        except Exception:
            self.failures += 1
            raise
        self.failures = 0
        return values

    def _tokenize(self, items: Sequence[Answered | Prompt]) -> list[list[int]]:
        return [checked(self._ids(item, number), number, self._about.context, self.vocabulary) for number, item in enumerate(items)]

    def _ids(self, item: Answered | Prompt, number: int) -> list[int]:
        if isinstance(item, str):
            return self.chat.text_ids(item)
        if is_ids(item):
            return cast(list[int], item)
        if not isinstance(item, Answered):
            *before, last = cast(Conversation, item)
            if last["role"] != "assistant":
                raise Refused(422, f"input {number} ends in the {last['role']}'s turn, a reward is for the assistant's", "messages")
            item = Answered(before, last["content"])
        if not item.response:
            raise Refused(422, f"input {number}: the response is empty", "messages")
        return templated(lambda: self.chat.conversation_ids(item.messages, item.response, item.ended))


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


@dataclass(frozen=True)
class Samples:
    """Responses to a prompt."""

    prompt_ids: list[int]
    samples: list[Sample]


class PolicyReplica:
    """A policy, or a judge, in a vLLM engine.

    Args:
        name: in requests.
        weights: its directory or hub id.
        engine: settings.
        max_model_len: longest prompt and response together, tokens.
        max_new_tokens: of a response whose request names no limit, at most.
        trust_remote_code: run Python code that comes with the model.
    """

    def __init__(self, name: str, weights: str, engine: Engine, max_model_len: int, max_new_tokens: int, trust_remote_code: bool = False):
        from actors.engine_loop import EngineLoop
        from actors.generator import policy_engine

        self.chat = Chat(weights, trust_remote_code)
        llm = policy_engine(weights, engine, max_model_len, trust_remote_code, text=True)
        self.vocabulary = llm.llm_engine.model_config.get_vocab_size()
        self.loop = EngineLoop(llm.llm_engine)
        self.takes_seeds = engine.num_gpus > 0
        self.max_new_tokens = max_new_tokens
        self._about = About(name, max_model_len, identity(self.chat))

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
        async for output in self._outputs(ids, draw, RequestOutputKind.FINAL_ONLY):
            return Samples(ids, [_sample(found) for found in sorted(output.outputs, key=lambda found: found.index)])
        raise AssertionError("an engine gives an output at the end")

    async def stream(self, prompt: Prompt, draw: Draw) -> AsyncIterator[Samples]:
        """One response, piece by piece.

        Raises:
            Refused: the prompt is empty or too long, or refused by the chat template.
        """
        from vllm.sampling_params import RequestOutputKind

        ids = await asyncio.to_thread(self._prompt_ids, prompt)
        async for output in self._outputs(ids, draw, RequestOutputKind.DELTA):
            yield Samples(ids, [_sample(output.outputs[0])])

    async def label_logps(self, prompt: Prompt, labels: Sequence[str]) -> list[float]:
        """Log-probs of words as the start of the response, among each other, by their first tokens.

        Raises:
            Refused: the prompt is too long, or two words start with the same token.
        """
        from vllm import SamplingParams

        ids = await asyncio.to_thread(self._prompt_ids, prompt)
        firsts = [self.chat.tokenizer(label, add_special_tokens=False).input_ids[0] for label in labels]
        if len(set(firsts)) < len(firsts):
            raise Refused(422, f"the labels {', '.join(labels)} start with the same token of this judge: use mode=text", "mode")
        params = SamplingParams(max_tokens=1, temperature=1.0, allowed_token_ids=firsts, logprobs=len(firsts), detokenize=False)
        async for output in self.loop.outputs(ids, params):
            (found,) = output.outputs[0].logprobs
            return [found[token].logprob for token in firsts]
        raise AssertionError("an engine gives an output at the end")

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            ids = self.chat.text_ids(prompt)
        elif is_ids(prompt):
            ids = cast(list[int], prompt)
        else:
            ids = templated(lambda: self.chat.prompt_ids(cast(Conversation, prompt)))
        # One token is left for the response.
        return checked(ids, 0, self._about.context - 1, self.vocabulary)

    async def _outputs(self, ids: list[int], draw: Draw, kind: Any) -> AsyncIterator[Any]:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        room = self._about.context - len(ids)
        if draw.max_tokens and draw.max_tokens > room:
            raise Refused(
                422, f"max_tokens={draw.max_tokens}: the prompt's {len(ids)} tokens leave {room} of {self._about.context}", "max_tokens"
            )
        if draw.seed is not None and not self.takes_seeds:
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
                seed=draw.seed,
                output_kind=kind,
            )
            async for output in self.loop.outputs(ids, params):
                yield output
        except (ValueError, VLLMClientError) as error:
            raise Refused(422, str(error)) from None


def is_ids(given: Any) -> bool:
    """Whether a prompt or an item is token ids."""
    return isinstance(given, list) and (not given or isinstance(given[0], int))


def _sample(found: Any) -> Sample:
    return Sample(found.text, list(found.token_ids), found.finish_reason, exact=not isinstance(found.stop_reason, str))


def templated(render: Any) -> list[int]:
    """What a chat template makes of a conversation.

    Raises:
        Refused: the template is a program of somebody else's, which may not want it.
    """
    try:
        return render()
    except Exception as error:  # noqa: BLE001
        raise Refused(422, f"the chat template refuses the conversation: {error}", "messages") from None


def checked(ids: list[int], number: int, most: int, vocabulary: int) -> list[int]:
    """Token ids that a model can read.

    Raises:
        Refused: there are none, too many, or some that are not in the vocabulary.
    """
    if not ids:
        raise Refused(422, f"input {number} is empty", "input")
    if len(ids) > most:
        raise Refused(422, f"input {number} has {len(ids)} tokens, the limit of this model is {most}", "input")
    if max(ids) >= vocabulary:
        raise Refused(422, f"input {number}: token {max(ids)} is not in the vocabulary of {vocabulary}", "input")
    return ids


def identity(chat: Chat) -> str:
    """Equal for tokenizers that make the same tokens of a conversation."""
    backend = chat.tokenizer.backend_tokenizer.to_str() if hasattr(chat.tokenizer, "backend_tokenizer") else chat.tokenizer.name_or_path
    parts = [json.loads(backend)["model"] if backend.startswith("{") else backend, chat.tokenizer.chat_template, chat.bos_id, chat.end_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def described(weights: str) -> str:
    """A model's name out of its directory or hub id."""
    return Path(weights).name if Path(weights).exists() else weights
