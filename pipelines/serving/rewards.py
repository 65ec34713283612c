"""The process that holds a reward model, as Ray Serve runs it: conversations in, rewards out."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from actors.batching import Batcher
from actors.engine_loop import EngineDead, end_process
from actors.loading import loading
from actors.prefixes import common
from actors.settings import RewardScoring
from pipelines.chat import Chat
from pipelines.serving.prompts import About, Conversation, Prompt, checked, conversations, identity, is_ids, templated
from pipelines.serving.refusal import Refused

SHARED = 16
"""tokens that sequences have to begin with alike to be computed together"""
BROKEN = 3
"""batches that fail one after the other in transformers before a replica is started anew; an engine's first one ends it"""


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


def alike(sequences: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Sequences that begin alike, such as N responses to a prompt, whose beginning is then computed once.

    Returns:
        (what they begin with, their places) of each group; every sequence has at least one token of its own.
    """
    groups: list[tuple[tuple[int, ...], list[int]]] = []
    for k in sorted(range(len(sequences)), key=lambda k: sequences[k]):
        own = sequences[k][:-1]
        if groups:
            prefix, members = groups[-1]
            shared = common(prefix, own)
            if shared >= SHARED:
                groups[-1] = (prefix[:shared], [*members, k])
                continue
        groups.append((own, [k]))
    return groups


def centre(config: Any) -> tuple[float, float] | None:
    """Mean and standard deviation of a reward model's rewards, where its config has them; they may be there and null."""
    mean, std = getattr(config, "reward_mean", None), getattr(config, "reward_std", None)
    return None if mean is None else (mean, std or 1.0)


class RewardReplica:
    """A reward model.

    Args:
        name: in requests.
        weights: its directory or hub id.
        scoring: settings of its processes.
        precision: of the forward pass.
        longest: no conversation is longer, tokens.
        trust_remote_code: run Python code that comes with the model.
        safetensors_only: read no weights in other formats.
    """

    @loading()
    def __init__(
        self,
        name: str,
        weights: str,
        scoring: RewardScoring,
        precision: str,
        longest: int,
        trust_remote_code: bool = False,
        safetensors_only: bool = False,
    ):
        from transformers import AutoConfig

        from actors.reward import engine as reward_engine

        self.model, context = reward_engine.load(weights, scoring, precision, longest, trust_remote_code, safetensors_only)
        self.chat = Chat(weights, trust_remote_code)
        config = AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code)
        self.vocabulary = config.get_text_config().vocab_size
        self._about = About(name, min(context, longest), identity(self.chat), centre(config), conversations(self.chat, reward=True))
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

        groups = alike(sequences)
        examples = [Example("", prefix, tuple(sequences[k][len(prefix) :] for k in members)) for prefix, members in groups]
        try:
            found = self.model(examples)
        except EngineDead as error:
            end_process(error)
            raise
        except Exception:
            self.failures += 1
            raise
        self.failures = 0
        values = dict(zip((k for _, members in groups for k in members), (value for row in found for value in row), strict=True))
        return [values[k] for k in range(len(sequences))]

    def _tokenize(self, items: Sequence[Answered | Prompt]) -> list[list[int]]:
        return [
            checked(self._ids(item, number), f"input {number}", "input", self._about.context, self.vocabulary)
            for number, item in enumerate(items)
        ]

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
            raise Refused(422, f"input {number}: the response is empty", "input")
        return templated(lambda: self.chat.conversation_ids(item.messages, item.response, item.ended))
