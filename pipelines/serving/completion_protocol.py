"""OpenAI's completions, and Best-of-N beside them."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, model_validator

from pipelines.serving.protocol import Body, Messages, Prompts, Reply, Text, Texts, Usage, as_list
from pipelines.serving.samples import Token


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
    """who responds: the policy, which may be left out, or a judge that runs here"""
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

    def alternatives(self) -> int | None:
        """Likeliest tokens that are to be given at every place of a response; None: no log-probs at all."""
        return None

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
    logprobs: bool = False
    """give the log-prob of every token of a response, before temperature and nucleus; not in a stream"""
    top_logprobs: int = Field(0, ge=0, le=20)
    """with logprobs: also those of the likeliest tokens at its place"""

    @model_validator(mode="after")
    def _told(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs={self.top_logprobs} needs logprobs=true")
        if self.logprobs and self.stream:
            raise ValueError("logprobs=true: a stream carries none, leave out stream")
        return self

    def most_tokens(self) -> int | None:
        """The length limit, by either name."""
        return self.max_completion_tokens or self.max_tokens

    def limit_name(self) -> str:
        """Its name."""
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"

    def alternatives(self) -> int | None:
        """Likeliest tokens at every place; None: no log-probs at all."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Sampled):
    """OpenAI's completion of a bare text, and Best-of-N."""

    prompt: Prompts = Field(examples=["2 and 3 make"])
    """text or token ids, one prompt or several"""
    max_tokens: int | None = Field(None, ge=1, examples=[64])
    """length limit of a response"""

    def most_tokens(self) -> int | None:
        """The length limit."""
        return self.max_tokens

    def limit_name(self) -> str:
        """Its name."""
        return "max_tokens"

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


class Likely(Body):
    """A token that may stand at some place of a response."""

    token: str = Field(examples=["A"])
    """its text"""
    logprob: float = Field(examples=[-0.25])
    """nats"""
    bytes: list[int] = Field(examples=[[65]])
    """its text in UTF-8"""


class Said(Likely):
    """A token of a response."""

    top_logprobs: list[Likely]
    """the likeliest tokens at its place"""


class Logprobs(Body):
    """Log-probs of a response."""

    content: list[Said]
    """token by token"""

    @classmethod
    def of(cls, tokens: Iterable[Token]) -> "Logprobs":
        """Log-probs of a response's tokens."""

        def likely(text: str, logp: float) -> dict[str, Any]:
            return {"token": text, "logprob": logp, "bytes": list(text.encode(errors="replace"))}

        return cls(
            content=[
                Said(**likely(token.text, token.logp), top_logprobs=[Likely(**likely(*other)) for other in token.likeliest])
                for token in tokens
            ]
        )


class ChatChoice(Choice):
    """A response to a conversation."""

    message: Answer
    """the turn"""
    logprobs: Logprobs | None = Field(None, examples=[None])
    """where they are asked for"""


class TextChoice(Choice):
    """A continuation of a text."""

    logprobs: None = None
    """not given"""
    text: str = Field(examples=[" 5."])
    """the words"""


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
