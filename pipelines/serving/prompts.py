"""What a model of the service is given: conversations, texts or token ids, and what it tells of itself."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from pipelines.chat import Chat
from pipelines.serving.refusal import Refused

Conversation = list[dict[str, str]]
Prompt = Conversation | str | list[int]
"""messages, a bare text, or token ids"""

PROBES = (
    (("user", "2 and 3?"),),
    (("system", "Be short."), ("user", " 2 and 3?\n")),
    (("user", "2 and 3?"), ("assistant", "What of them?\n"), ("user", "Added.")),
)
"""conversations that tell chat templates apart"""


@dataclass(frozen=True)
class About:
    """What the gateway has to know of a model."""

    name: str
    context: int
    """tokens"""
    tokenizer: str
    """the same for models whose token ids mean the same"""
    centre: tuple[float, float] | None = None
    """mean and standard deviation of a reward model's rewards, where they are stored"""
    chat: str = ""
    """the same for a policy and a reward model that reads conversations as the policy leaves them, at the end of its response"""


def is_ids(given: Any) -> bool:
    """Whether a prompt or an item is token ids."""
    return isinstance(given, list) and (not given or isinstance(given[0], int))


def field_of(prompt: Prompt) -> str:
    """Where it stands in a request for samples."""
    return "prompt" if isinstance(prompt, str) or is_ids(prompt) else "messages"


def templated(render: Any) -> list[int]:
    """What a chat template makes of a conversation.

    Raises:
        Refused: the template is a program of somebody else's, which may not want it.
    """
    try:
        return render()
    except Exception as error:  # noqa: BLE001
        raise Refused(422, f"the chat template refuses the conversation: {error}", "messages") from None


def checked(ids: list[int], what: str, field: str, most: int, vocabulary: int) -> list[int]:
    """Token ids that a model can read.

    Raises:
        Refused: there are none, too many, or some that are not in the vocabulary.
    """
    if not ids:
        raise Refused(422, f"{what} is empty", field)
    if len(ids) > most:
        raise Refused(422, f"{what} has {len(ids)} tokens, the limit of this model is {most}", field)
    if max(ids) >= vocabulary:
        raise Refused(422, f"{what}: token {max(ids)} is not in the vocabulary of {vocabulary}", field)
    return ids


def identity(chat: Chat) -> str:
    """Equal for tokenizers whose ids mean the same, and that begin a text alike."""
    from actors.learner.policy import PAD

    # Which nobody says; reward models that are trained here may have one more token for it.
    said = {token: number for token, number in chat.tokenizer.get_vocab().items() if token != PAD}
    return _digest([said, chat.bos_id])


def conversations(chat: Chat, reward: bool = False) -> str:
    """Equal for a policy and a reward model, where the one leaves conversations as the other reads them."""
    from actors.learner.policy import WHOLE

    # A reward model of ours was trained on what policies leave, not on what the template makes of a whole conversation.
    render = chat.read_text if reward and not str(chat.tokenizer.chat_template).startswith(WHOLE) else chat.left_text
    told: list[str | None] = []
    for messages in PROBES:
        try:
            told.append(render([{"role": role, "content": words} for role, words in messages], "Five, I think."))
        except Exception:  # noqa: BLE001
            # Many templates want no system's turn.
            told.append(None)
    return _digest(told)


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
