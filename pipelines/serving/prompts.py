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


def is_ids(given: Any) -> bool:
    """Whether a prompt or an item is token ids."""
    return isinstance(given, list) and (not given or isinstance(given[0], int))


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
