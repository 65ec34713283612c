"""Requests and responses about rewards and verdicts: vLLM's classify, score and rerank, OpenRLHF's get_reward, and the judge."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, model_validator

from pipelines.serving.protocol import Body, Ids, Message, Messages, Prompts, Reply, Text, Texts, Usage, as_list

Spoken = Text | Messages
"""a text, which is one turn, or a conversation"""
Said = Annotated[Text, Field(min_length=1)]
"""a response: an empty one is none"""
Fields = tuple[str, str]
"""names of a request's fields"""


class Rewarded(Body):
    """Which reward model, and in which form."""

    model: Text | None = Field(None, examples=["reward"])
    """name of the reward model; the first by default"""
    normalize: bool = False
    """centre and scale by the mean and the standard deviation that are stored with the model"""
    use_activation: bool | None = Field(None, examples=[False])
    """squash the reward to 0..1 by a sigmoid, as vLLM does; false gives the reward itself"""
    truncate_prompt_tokens: int | None = Field(None, examples=[None])
    """taken and not used: what is too long is refused, not cut"""
    user: Text | None = Field(None, examples=["somebody"])
    """taken and not used"""


class ClassifyRequest(Rewarded):
    """vLLM's /classify: texts, token ids, or one conversation whose last turn is judged."""

    input: Prompts | None = Field(None, examples=[["2 and 3 make 5.", "2 and 3 make 6."]])
    """whole conversations as text or token ids, one or several"""
    messages: Messages | None = Field(None, examples=[None])
    """a conversation that ends in the assistant's turn"""

    continue_final_message: bool = False
    """the last turn of messages was cut: nothing is put after its words"""

    @model_validator(mode="after")
    def _one_of_both(self) -> "ClassifyRequest":
        if (self.input is None) == (self.messages is None):
            raise ValueError("give either input or messages")
        return self

    def fields(self) -> Fields:
        """Where inputs stand, and the conversation."""
        return ("messages", "messages") if self.messages else ("input", "input")

    def size(self) -> tuple[int, int]:
        """Inputs, and turns of a conversation."""
        return (1, len(self.messages)) if self.messages else (len(as_list(self.input)), 0)

    def items(self) -> list[Any]:
        """One by one."""
        return [[message.plain() for message in self.messages]] if self.messages else as_list(self.input)


class Classified(Body):
    """The reward of one input."""

    index: int = Field(examples=[0])
    """of the input"""
    label: str | None = Field(None, examples=["LABEL_0"])
    """name of the only label"""
    probs: list[float] = Field(examples=[[1.25]])
    """one number"""
    num_classes: int = 1
    """a reward model has one"""


class ClassifyResponse(Reply):
    """Rewards in vLLM's shape."""

    object: Literal["list"] = "list"
    """kind of answer"""
    data: list[Classified]
    """in the order of the inputs"""
    usage: Usage
    """tokens read"""


class ScoreRequest(Rewarded):
    """vLLM's /score: a question with answers to it. One question goes with every answer; several go with as many answers."""

    queries: Spoken | Texts = Field(validation_alias=AliasChoices("queries", "text_1", "data_1"), examples=["What is 2 and 3?"])
    """what was asked: a text, several, or a conversation"""
    documents: Text | Texts = Field(
        validation_alias=AliasChoices("documents", "items", "text_2", "data_2"), examples=[["It is 5.", "It is 6."]]
    )
    """what was answered"""

    @model_validator(mode="after")
    def _pairs(self) -> "ScoreRequest":
        queries, documents = count(self.queries), len(as_list(self.documents))
        if not documents or queries not in (1, documents):
            raise ValueError(f"{queries} queries and {documents} documents make no pairs: give one query, or as many as documents")
        return self

    def fields(self) -> Fields:
        """Where inputs stand, and the conversation."""
        return "documents", "queries"

    def size(self) -> tuple[int, int]:
        """Inputs, and turns of a conversation."""
        return len(as_list(self.documents)), turns(self.queries)

    def items(self) -> list[list[dict[str, str]]]:
        """Conversations that end in an answer."""
        documents = as_list(self.documents)
        queries = conversations(self.queries)
        queries = queries * len(documents) if len(queries) == 1 else queries
        return [answered(query, document) for query, document in zip(queries, documents, strict=True)]


class Score(Body):
    """The reward of one answer."""

    index: int = Field(examples=[0])
    """of the pair"""
    object: Literal["score"] = "score"
    """kind of answer"""
    score: float = Field(examples=[0.78])
    """the reward"""


class ScoreResponse(Reply):
    """Rewards in vLLM's shape."""

    object: Literal["list"] = "list"
    """kind of answer"""
    data: list[Score]
    """in the order of the pairs"""
    usage: Usage
    """tokens read"""


class RerankRequest(Rewarded):
    """vLLM's /rerank: answers to a question, the best first."""

    query: Spoken = Field(examples=["What is 2 and 3?"])
    """what was asked: a text, or a conversation"""
    documents: Annotated[Texts, Field(min_length=1)] = Field(examples=[["It is 5.", "It is 6."]])
    """what was answered"""
    top_n: int = Field(0, ge=0)
    """how many are given back; 0: all"""

    def fields(self) -> Fields:
        """Where inputs stand, and the conversation."""
        return "documents", "query"

    def size(self) -> tuple[int, int]:
        """Inputs, and turns of a conversation."""
        return len(self.documents), turns(self.query)

    def items(self) -> list[list[dict[str, str]]]:
        """Conversations that end in an answer."""
        (query,) = conversations(self.query)
        return [answered(query, document) for document in self.documents]


class Document(Body):
    """An answer."""

    text: str = Field(examples=["It is 5."])
    """its words"""


class Ranked(Body):
    """An answer with its reward."""

    index: int = Field(examples=[0])
    """among the documents given"""
    document: Document
    """the answer"""
    relevance_score: float = Field(examples=[0.78])
    """the reward"""


class RerankResponse(Reply):
    """Answers, the best first."""

    usage: Usage
    """tokens read"""
    results: list[Ranked]
    """the best first"""


class GetRewardRequest(Body):
    """What OpenRLHF's trainer sends to a remote reward model."""

    query: Annotated[list[Text | Ids], Field(min_length=1, fail_fast=True)] = Field(examples=[["2 and 3 make 5."]])
    """whole conversations, in the words of their chat template"""
    prompts: Texts | None = Field(None, examples=[["What is 2 and 3?"]])
    """their prompts; taken and not used"""
    labels: list[Any] | None = Field(None, examples=[["5"]])
    """their labels; taken and not used"""
    model: Text | None = Field(None, examples=["reward"])
    """name of the reward model; the first by default"""
    normalize: bool = False
    """centre and scale by the mean and the standard deviation that are stored with the model"""

    def fields(self) -> Fields:
        """Where inputs stand, and the conversation."""
        return "query", "query"

    def size(self) -> tuple[int, int]:
        """Inputs, and turns of a conversation."""
        return len(self.query), 0

    def items(self) -> list[Any]:
        """One by one."""
        return list(self.query)


class GetRewardResponse(Body):
    """What OpenRLHF's trainer reads."""

    rewards: list[float] = Field(examples=[[1.25]])
    """one a query"""
    scores: list[float] = Field(examples=[[0.78]])
    """the same squashed to 0..1 by a sigmoid, for the trainer's filter of prompts"""
    extra_logs: dict[str, list[float]] = Field(examples=[{"tokens": [12.0]}])
    """for the trainer's log: tokens a query"""


class Question(Body):
    """A conversation with two responses to be compared, or with one to be graded."""

    messages: Messages
    """the conversation so far"""
    responses: Annotated[list[Said], Field(min_length=1, max_length=2)] = Field(examples=[["It is 5.", "It is 6."]])
    """two to compare, one to grade from 1 to 10"""


class JudgeRequest(Body):
    """Questions for the judge: one, or a batch."""

    messages: Messages | None = Field(None, examples=[[{"role": "user", "content": "What is 2 and 3?"}]])
    """the conversation so far"""
    responses: Annotated[list[Said], Field(min_length=1, max_length=2)] | None = Field(None, examples=[["It is 5.", "It is 6."]])
    """two to compare, one to grade from 1 to 10"""
    batch: Annotated[list[Question], Field(min_length=1, fail_fast=True)] | None = Field(None, examples=[None])
    """several questions, in place of messages and responses"""
    model: Text | None = Field(None, examples=["judge"])
    """name of the judge; may be left out, there is one"""
    criterion: Literal["helpful", "harmless", "summary", "mt_bench"] | None = Field(None, examples=["helpful"])
    """which of the judge's templates; helpful by default"""
    template: Text | None = Field(None, examples=[None])
    """a template of your own: {conversation}, {first} and {second} (one response: {response}) are filled in"""
    mode: Literal["text", "logprob"] | None = Field(None, examples=["text"])
    """read the verdict from what the judge writes, or compare the probabilities of the two labels; the service's own by default"""

    @model_validator(mode="after")
    def _consistent(self) -> "JudgeRequest":
        alone = self.messages is not None and self.responses is not None
        if (self.messages is None) != (self.responses is None) or alone == (self.batch is not None):
            raise ValueError("give either messages and responses, or batch")
        if self.criterion and self.template:
            raise ValueError("give either criterion or template")
        return self

    def questions(self) -> list[Question]:
        """One by one."""
        return self.batch or [Question(messages=self.messages or [], responses=self.responses or [])]


class Verdict(Body):
    """What the judge thinks."""

    winner: Literal[0, 1, "tie", "unparsed"] | None = Field(None, examples=[0])
    """the better response: both orders name it; "tie": they disagree; "unparsed": a verdict could not be read; null for grades"""
    verdicts: list[Literal[0, 1, "tie", "unparsed"]] = Field(default_factory=list, examples=[[0, 0]])
    """in the order given, and in the other order"""
    grade: float | None = Field(None, examples=[None])
    """1 to 10, of a single response; null where it could not be read"""
    explanation: str = Field("", examples=["The first response is right."])
    """what the judge wrote, or the probabilities of its labels"""
    usage: Usage = Field(default_factory=Usage)
    """what it read and wrote, in both orders; of a batch, all of it"""


class JudgeResponse(Reply, Verdict):
    """The verdict, or several."""

    data: list[Verdict] | None = Field(None, examples=[None])
    """of a batch, in its order"""


def turns(given: Any) -> int:
    """Number of turns of a conversation; a text is one."""
    return len(given) if _is_conversation(given) else 1


def count(given: Any) -> int:
    """Conversations among them: texts are one each."""
    return 1 if _is_conversation(given) else len(as_list(given))


def _is_conversation(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and isinstance(given[0], Message)


def conversations(given: Any) -> list[list[dict[str, str]]]:
    """Texts, each the one turn of a user, or one conversation."""
    if _is_conversation(given):
        return [[message.plain() for message in given]]
    return [[{"role": "user", "content": text}] for text in as_list(given)]


def answered(conversation: list[dict[str, str]], response: str) -> list[dict[str, str]]:
    """A conversation with the assistant's answer."""
    return [*conversation, {"role": "assistant", "content": response}]
