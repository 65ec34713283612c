"""What goes over the wire: requests and responses in shapes that clients already speak, every field described.

OpenAI's completions with Best-of-N beside them, vLLM's classify, score and rerank, OpenRLHF's get_reward, and a judge of our own.
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
        """Of several."""
        counts = [(part.prompt_tokens, part.completion_tokens) for part in parts]
        return cls.of(sum(prompt for prompt, _ in counts), sum(completion for _, completion in counts))


class StreamOptions(Body):
    """What a stream says beside its words."""

    include_usage: bool = False
    """send one more chunk at the end, with the usage and no choices"""


IDLE: dict[str, Any] = {"logprobs": False, "tools": [], "response_format": {"type": "text"}, "echo": False, "logit_bias": {}}
"""fields of OpenAI's that we have not, with the values by which they ask for nothing"""
UNUSED = {"store", "metadata", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier"}
"""fields of OpenAI's that change no response"""


class Sampled(Body):
    """How responses are drawn, and which of them are given back. Null asks for nothing, as with OpenAI."""

    model: Text | None = Field(None, examples=["policy"])
    """name of the policy; may be left out, there is one"""
    temperature: float = Field(1.0, ge=0, le=2)
    """softmax temperature; 0 takes the most likely token always"""
    top_p: float = Field(1.0, gt=0, le=1)
    """nucleus: sample from the smallest set of tokens with this probability"""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """taken off the logit of every token that was said before"""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """the same, for every time that it was said"""
    seed: int | None = Field(None, ge=0, lt=2**62, examples=[None])
    """the same request with the same seed gives the same samples; an engine on a CPU cannot"""
    stop: Text | Texts | None = Field(None, examples=["\n\n"])
    """words before which a response ends, four at most"""
    n: int = Field(1, ge=1)
    """choices given back, the best first"""
    best_of_n: int | None = Field(None, ge=1, examples=[16])
    """samples drawn, from which a reward model chooses; n by default. 1 is a plain completion"""
    reward_model: Text | None = Field(None, examples=["reward"])
    """who chooses; by default the first reward model. Every choice then carries its reward"""
    stream: bool = False
    """send server-sent events; of several samples the winner's words come once it is known"""
    stream_options: StreamOptions | None = Field(None, examples=[{"include_usage": True}])
    """of a stream"""
    user: Text | None = Field(None, examples=["somebody"])
    """taken and not used"""

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        idle = [key for key, value in given.items() if value is None or key in UNUSED or (key in IDLE and value == IDLE[key])]
        return {key: value for key, value in given.items() if key not in idle or key in ("messages", "prompt")}

    @model_validator(mode="after")
    def _consistent(self) -> "Sampled":
        if self.n > self.draws():
            raise ValueError(f"n={self.n} choices cannot be given back from best_of_n={self.best_of_n} samples")
        if self.stream and self.n > 1:
            raise ValueError(f"a stream has one choice: n={self.n} must be 1")
        if len(self.stops()) > 4 or not all(self.stops()):
            raise ValueError("stop has up to 4 words, none of them empty")
        if self.temperature == 0 and self.draws() > 1:
            raise ValueError(f"temperature=0 gives the same response every time: {self.draws()} samples need a temperature above 0")
        return self

    def draws(self) -> int:
        """Samples that are drawn."""
        return self.best_of_n or self.n

    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class ChatCompletionRequest(Sampled):
    """OpenAI's chat completion, and Best-of-N."""

    messages: Messages
    """the conversation so far"""
    max_tokens: int | None = Field(None, ge=1, examples=[64])
    """length limit of a response; max_completion_tokens is another name for it"""
    max_completion_tokens: int | None = Field(None, ge=1, examples=[64])
    """length limit of a response"""

    def most_tokens(self) -> int | None:
        """The length limit, by either name."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Sampled):
    """OpenAI's completion of a bare text, and Best-of-N."""

    prompt: Prompts = Field(examples=["2 and 3 make"])
    """text or token ids, one prompt or several"""
    max_tokens: int | None = Field(None, ge=1, examples=[64])
    """length limit of a response"""

    def most_tokens(self) -> int | None:
        """The length limit."""
        return self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """One by one."""
        return as_list(self.prompt)


class Answer(Body):
    """What the assistant said."""

    role: Literal["assistant"] = "assistant"
    """who speaks"""
    content: str = Field(examples=["2 + 3 = 5\n#### 5"])
    """what is said"""


class Choice(Body):
    """A response that was chosen."""

    index: int = Field(examples=[0])
    """0 is the best"""
    finish_reason: Literal["stop", "length"] = "stop"
    """"length": cut at the limit"""
    reward: float | None = Field(None, examples=[1.25])
    """the reward model's; null where nobody was asked"""
    logprobs: None = None
    """not given"""


class ChatChoice(Choice):
    """A response to a conversation."""

    message: Answer
    """the turn"""


class TextChoice(Choice):
    """A continuation of a text."""

    text: str = Field(examples=[" 5."])
    """the words"""


class Reply(Body):
    """What every answer of a model says of itself."""

    id: str = Field(default_factory=lambda: f"gsil-{uuid.uuid4().hex}", examples=["gsil-5f0c"])
    """of the request"""
    created: int = Field(default_factory=lambda: int(time.time()), examples=[1767225600])
    """seconds since 1970"""
    model: str = Field(examples=["policy"])
    """who answered"""


class ChatCompletion(Reply):
    """The answer to a conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    """kind of answer"""
    choices: list[ChatChoice]
    """the best first"""
    usage: Usage
    """tokens of all samples"""


class Completion(Reply):
    """The answer to bare texts."""

    object: Literal["text_completion"] = "text_completion"
    """kind of answer"""
    choices: list[TextChoice]
    """of the first prompt, the best first; then of the second ..."""
    usage: Usage
    """tokens of all samples"""


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
