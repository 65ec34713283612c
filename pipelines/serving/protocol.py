"""What goes over the wire: requests and responses in shapes that clients already speak, every field described.

Here what they share; OpenAI's completions are in completion_protocol.py, rewards and verdicts in reward_protocol.py.
"""

import time
import uuid
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _sayable(text: str) -> str:
    text.encode("utf-8")
    return text


Text = Annotated[str, AfterValidator(_sayable)]
"""text that can be written as UTF-8: JSON can spell half a character ("\\ud800")"""
Texts = Annotated[list[Text], Field(fail_fast=True)]
"""texts; the first that is wrong is told, a body may have room for a million"""
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
"""token ids"""
Prompts = Text | Ids | Texts | Annotated[list[Ids], Field(fail_fast=True)]
"""text or token ids, one or several"""


class Body(BaseModel):
    """Strict about names and types: a field that nobody reads is an error, and so is a number that is none."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=())


class Part(Body):
    """A piece of a message."""

    type: Literal["text"]
    """only text"""
    text: Text = Field(examples=["What is 2 and 3?"])
    """its words"""


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """who speaks; developer is OpenAI's newer word for system"""
    content: Text | Annotated[list[Part], Field(fail_fast=True)] = Field(examples=["What is 2 and 3?"])
    """what is said"""

    @model_validator(mode="before")
    @classmethod
    def _given_back(cls, given: Any) -> Any:
        """Without a speaker's name, which no chat template reads, and what OpenAI's client sends back of an answer, where that is empty."""
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if key in cls.model_fields or not (value in (None, []) or key == "name")}

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        words = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": words}


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class Usage(Body):
    """Tokens that a request cost, all samples of Best-of-N together."""

    prompt_tokens: int = Field(0, examples=[31])
    """of the prompt"""
    completion_tokens: int = Field(0, examples=[512])
    """of all responses that were sampled"""
    total_tokens: int = Field(0, examples=[543])
    """both"""

    @classmethod
    def of(cls, prompt: int, completion: int = 0) -> "Usage":
        """Tokens read and tokens sampled."""
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    @classmethod
    def summed(cls, parts: Iterable["Usage"]) -> "Usage":
        """The usage of several together."""
        counts = [(part.prompt_tokens, part.completion_tokens) for part in parts]
        return cls.of(sum(prompt for prompt, _ in counts), sum(completion for _, completion in counts))


class Reply(Body):
    """What every answer of a model says of itself."""

    id: str = Field(default_factory=lambda: f"gsil-{uuid.uuid4().hex}", examples=["gsil-5f0c"])
    """of the request"""
    created: int = Field(default_factory=lambda: int(time.time()), examples=[1767225600])
    """seconds since 1970"""
    model: str = Field(examples=["policy"])
    """who answered"""


class ModelCard(Body):
    """A model that is served."""

    id: str = Field(examples=["policy"])
    """its name in requests"""
    object: Literal["model"] = "model"
    """kind of answer"""
    created: int = Field(default_factory=lambda: int(time.time()), examples=[1767225600])
    """seconds since 1970"""
    owned_by: str = "gsil-ray"
    """who serves it"""
    kind: Literal["policy", "reward", "ensemble", "judge"]
    """what it does"""
    max_model_len: int | None = Field(None, examples=[2048])
    """its context, tokens"""


class ModelList(Body):
    """All models that are served."""

    object: Literal["list"] = "list"
    """kind of answer"""
    data: list[ModelCard]
    """one by one"""


class ErrorDetail(Body):
    """What was wrong."""

    message: str = Field(examples=["n=0: input should be greater than or equal to 1"])
    """for a person"""
    type: str = Field(examples=["invalid_request_error"])
    """kind of error"""
    param: str | None = Field(None, examples=["n"])
    """the field"""
    code: int = Field(examples=[422])
    """the HTTP status"""


class ErrorResponse(Body):
    """Every answer that is not 2xx."""

    error: ErrorDetail
    """what was wrong"""


def as_list(given: Any) -> list[Any]:
    """Texts or token ids, one or several, as a list of them."""
    single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    return [given] if single else list(given)
