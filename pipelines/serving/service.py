"""What the service does with its models: Best-of-N out of a policy and a reward model, rewards in several shapes, verdicts of a judge.

completion: policy --n samples--> reward model --> sorted, the best first
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np

from actors.reward.best_of_n import combine
from pipelines.serving.backends import together
from pipelines.serving.completion_protocol import ChatCompletionRequest, CompletionRequest, Sampled
from pipelines.serving.prompts import About, Conversation, Prompt, field_of, is_ids
from pipelines.serving.protocol import ModelCard, Usage
from pipelines.serving.refusal import Busy, Refused
from pipelines.serving.rewards import Answered, Rewards
from pipelines.serving.samples import Draw, Sample, Samples
from pipelines.serving.settings import Ensemble

ABOUT_SECONDS = 5.0
"""how long a model's word on itself is believed"""
BUSY_SECONDS = 0.2
"""between two tries to get samples into a full queue"""


class Backend(Protocol):
    """A deployment: `Remote`, or its like in a test."""

    async def call(self, method: str, *args: Any) -> Any:
        """The result of a method."""
        ...

    def stream(self, method: str, *args: Any) -> AsyncIterator[Any]:
        """The results of a method that gives several."""
        ...


class Told:
    """A model's word on itself, asked again after some seconds: an update may have put another one in its place.

    Args:
        backend: the model.
    """

    def __init__(self, backend: Backend):
        self.backend = backend
        self.about: About | None = None
        self.since = 0.0

    async def __call__(self) -> About:
        """The word; while the model is too busy to be asked, the last one.

        Raises:
            Refused: it never said one.
        """
        if self.about is None or time.monotonic() - self.since > ABOUT_SECONDS:
            try:
                self.about = await self.backend.call("about")
            except Refused:
                if self.about is None:
                    raise
            self.since = time.monotonic()
        return self.about


@dataclass(frozen=True)
class Ranked:
    """Samples of one prompt, the best first."""

    model: str
    """who said them"""
    samples: list[Sample]
    rewards: list[float | None]
    usage: Usage


@dataclass
class RewardModels:
    """The reward models by name, and the ensemble of all."""

    backends: Mapping[str, Backend]
    ensemble: Ensemble
    aliases: Mapping[str, str] = field(default_factory=dict)
    """other names of models: some trainers call a model by its path"""

    def __post_init__(self) -> None:
        self.told = {name: Told(backend) for name, backend in self.backends.items()}

    def names(self) -> list[str]:
        """As requests call them, the default first: the ensemble, if there is one."""
        return [*([self.ensemble.name] if self.ensemble.name else []), *self.backends]

    def choose(self, asked: str | None, field: str = "model") -> str:
        """The name asked for, or the default.

        Args:
            asked: a name.
            field: of the request, where it stands.

        Raises:
            Refused: there is none.
        """
        names = self.names()
        asked = self.aliases.get(asked, asked) if asked else asked
        if not names:
            raise Refused(404, "this service has no reward model", field)
        if asked is not None and asked not in names:
            raise Refused(404, f"there is no reward model {asked!r}: there are {', '.join(names)}", field)
        return asked or names[0]

    async def rewards(self, name: str, items: Sequence[Any], normalize: bool = False) -> Rewards:
        """Rewards of items, in the form of one model or of the ensemble's rule.

        Raises:
            Refused: an item cannot be rewarded, or a normalised reward is asked of a model that stores no mean.
        """
        members = list(self.backends) if name == self.ensemble.name else [name]
        found: list[Rewards] = await together(*(self.backends[member].call("rewards", items) for member in members))
        values_MN = np.array([rewards.values for rewards in found], dtype=np.float64)
        if normalize or (len(members) > 1 and self.ensemble.normalised):
            for row, member in enumerate(members):
                mean, std = await self._centre(member)
                values_MN[row] = (values_MN[row] - mean) / std
        values = combine(values_MN, self.ensemble.combine, self.ensemble.k) if len(members) > 1 else values_MN[0]
        if not np.isfinite(values).all():
            raise Refused(503, f"the reward model {name} gave a reward that is no finite number", "model")
        # Every member reads every item.
        return Rewards(values.tolist(), [sum(counts) for counts in zip(*(rewards.tokens for rewards in found), strict=True)])

    async def described(self, name: str) -> About:
        """A member."""
        return await self.told[name]()

    async def _centre(self, name: str) -> tuple[float, float]:
        centre = (await self.described(name)).centre
        if centre is None:
            raise Refused(422, f"normalize: the reward model {name} stores no mean and deviation (reward_mean in its config)", "normalize")
        return centre

    async def reads_tokens(self, name: str, policy: About, prompt: Prompt, request: Sampled) -> bool:
        """Whether a reward model is given the policy's own tokens: theirs mean the same, and a conversation is read as the policy leaves
        it. Else it is given words.

        Raises:
            Refused: there would be no words of it; nothing has to be sampled for nothing.
        """
        told = [await self.described(member) for member in (self.backends if name == self.ensemble.name else [name])]
        same = {about.tokenizer for about in told} == {policy.tokenizer}
        if is_ids(prompt):
            if not same:
                raise Refused(422, f"a prompt of token ids: the tokens of the reward model {name} are others, give text", "prompt")
            if request.stops():
                raise Refused(422, "stop: a response that ends before a word is rewarded as text, a prompt of token ids is none", "stop")
        return same and (not isinstance(prompt, list) or is_ids(prompt) or {about.chat for about in told} == {policy.chat})


def _item(prompt: Prompt, prompt_ids: list[int], sample: Sample, same: bool) -> Any:
    """A sample as a reward model reads it."""
    if is_ids(prompt) or (same and sample.exact and sample.ids):
        return [*prompt_ids, *sample.ids]
    if isinstance(prompt, str):
        return prompt + sample.text
    return Answered(cast(Conversation, prompt), sample.text or " ", ended=sample.finish_reason == "stop")


class Service:
    """The composition.

    Args:
        writers: models that sample responses, by name: the policy, which is asked by default, and a judge that runs here.
        rewards: the reward models.
    """

    def __init__(self, writers: Mapping[str, Backend], rewards: RewardModels):
        self.writers = writers
        self.told = {name: Told(backend) for name, backend in writers.items()}
        self.reward_models = rewards

    def writer(self, request: Sampled) -> str:
        """Who is to respond.

        Raises:
            Refused: there is nobody, or nobody of that name.
        """
        if not self.writers:
            raise Refused(404, "this service has no policy: it only rewards", "model")
        asked = next(iter(self.writers)) if request.model is None else request.model
        if asked not in self.writers:
            raise Refused(404, f"there is no policy {asked!r}: there is {' and '.join(map(repr, self.writers))}", "model")
        return asked

    async def best_of_n(self, prompt: Prompt, request: ChatCompletionRequest | CompletionRequest) -> Ranked:
        """Samples of a prompt, the best first by the reward model's reward; unsorted, and without, where nobody rewards."""
        name, chooser = self.writer(request), self._chooser(request)
        same = chooser is not None and await self.reward_models.reads_tokens(chooser, await self.told[name](), prompt, request)
        found: Samples = await self.writers[name].call("sample", prompt, _draw(request))
        usage = Usage.of(len(found.prompt_ids), sum(len(sample.ids) for sample in found.samples))
        if chooser is None:
            return Ranked(name, found.samples[: request.n], [None] * request.n, usage)
        rewards = await self._rewards(chooser, prompt, [_item(prompt, found.prompt_ids, sample, same) for sample in found.samples])
        order = sorted(range(len(rewards)), key=lambda number: -rewards[number])[: request.n]
        return Ranked(name, [found.samples[number] for number in order], [rewards[number] for number in order], usage)

    async def stream(
        self, prompt: Prompt, request: ChatCompletionRequest | CompletionRequest
    ) -> AsyncGenerator[tuple[Sample, float | None, Usage], None]:
        """One response piece by piece: as it is sampled, or the winner of several once it is known."""
        name, chooser = self.writer(request), self._chooser(request)
        if request.draws() > 1:
            best = await self.best_of_n(prompt, request)
            (winner,), (reward,) = best.samples, best.rewards
            pieces = _pieces(winner.text)
            for number, piece in enumerate(pieces, start=1):
                last = number == len(pieces)
                yield Sample(piece, [], winner.finish_reason if last else None), reward if last else None, best.usage
            return
        same = chooser is not None and await self.reward_models.reads_tokens(chooser, await self.told[name](), prompt, request)
        whole = Samples([], [Sample("", [], None)])
        async for found in self.writers[name].stream("stream", prompt, _draw(request)):
            (piece,), (before,) = found.samples, whole.samples
            whole = Samples(
                found.prompt_ids,
                [Sample(before.text + piece.text, before.ids + piece.ids, piece.finish_reason, before.exact and piece.exact)],
            )
            reward = None
            if piece.finish_reason and chooser is not None:
                (reward,) = await self._rewards(chooser, prompt, [_item(prompt, whole.prompt_ids, whole.samples[0], same)])
            yield piece, reward, Usage.of(len(found.prompt_ids), len(whole.samples[0].ids))

    async def _rewards(self, chooser: str, prompt: Prompt, items: list[Any]) -> list[float]:
        """Rewards of samples that are there: whoever waited for them waits for a place in the queue, too, up to the time of the request."""
        while True:
            try:
                return (await self.reward_models.rewards(chooser, items)).values
            except Busy:
                await asyncio.sleep(BUSY_SECONDS)
            except Refused as refused:
                if refused.status != 422:
                    raise
                why = f"the reward model {chooser} cannot read a sample: {refused.message}"
                raise Refused(422, why, field_of(prompt)) from None

    async def models(self) -> list[ModelCard]:
        """All that are served."""
        cards = [ModelCard(id=name, kind="policy", max_model_len=(await told()).context) for name, told in self.told.items()]
        if self.reward_models.ensemble.name:
            cards.append(ModelCard(id=self.reward_models.ensemble.name, kind="ensemble"))
        for name in self.reward_models.backends:
            cards.append(ModelCard(id=name, kind="reward", max_model_len=(await self.reward_models.described(name)).context))
        return cards

    def _chooser(self, request: Sampled) -> str | None:
        """Who rewards: nobody has to where nothing is chosen."""
        if request.reward_model is None and (request.draws() == 1 or not self.reward_models.names()):
            if request.draws() > request.n:
                raise Refused(422, "best_of_n: this service has no reward model that could choose", "best_of_n")
            return None
        return self.reward_models.choose(request.reward_model, "reward_model")


def _draw(request: ChatCompletionRequest | CompletionRequest) -> Draw:
    return Draw(
        n=request.draws(),
        temperature=request.temperature,
        top_p=request.top_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        stop=tuple(request.stops()),
        seed=request.seed,
        max_tokens=request.most_tokens(),
        limit=request.limit_name(),
        top_logprobs=request.alternatives(),
    )


def _pieces(text: str) -> list[str]:
    """A text word by word; one empty piece of an empty text."""
    words = text.split(" ")
    return [words[0], *(f" {word}" for word in words[1:])]


def squashed(reward: float) -> float:
    """A reward between 0 and 1: the sigmoid, without overflow."""
    return 1 / (1 + math.exp(-reward)) if reward >= 0 else math.exp(reward) / (1 + math.exp(reward))
