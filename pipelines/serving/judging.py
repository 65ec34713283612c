"""The judge: which of two responses is better, asked in both orders; or a grade for one."""

from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Protocol

from actors.judge import prompts
from actors.judge.verdicts import Reading, read_grade, read_pair, read_probabilities, turned, winner
from pipelines.judges.endpoint import Endpoint, EndpointError, Said
from pipelines.serving.backends import together
from pipelines.serving.protocol import Usage
from pipelines.serving.refusal import Refused
from pipelines.serving.reward_protocol import JudgeRequest, Question, Verdict
from pipelines.serving.samples import Draw, Labels, Samples
from pipelines.serving.service import Backend
from pipelines.serving.settings import JudgeService


class Writer(Protocol):
    """A model that answers a question."""

    async def write(self, question: str, max_new_tokens: int) -> Said:
        """Its words."""
        ...

    async def label_logps(self, question: str, labels: Sequence[str]) -> Said:
        """Log-probs of labels as the start of its answer."""
        ...


class LocalWriter:
    """A judge in an engine of this service."""

    def __init__(self, backend: Backend):
        self.backend = backend

    async def write(self, question: str, max_new_tokens: int) -> Said:
        """Its words, by the most likely tokens."""
        draw = Draw(1, 0.0, 1.0, 0.0, 0.0, (), None, max_new_tokens)
        found: Samples = await self.backend.call("sample", _asked(question), draw)
        (sample,) = found.samples
        return Said(sample.text, None, len(found.prompt_ids), len(sample.ids), sample.finish_reason == "length")

    async def label_logps(self, question: str, labels: Sequence[str]) -> Said:
        """Log-probs of labels as the start of its answer: one token of it."""
        found: Labels = await self.backend.call("label_logps", _asked(question), list(labels))
        return Said("", found.logps, len(found.prompt_ids), 1)


class UrlWriter:
    """A judge behind an OpenAI-compatible endpoint.

    Args:
        settings: its URL, its name there, and where its key is.
    """

    def __init__(self, settings: JudgeService):
        self.endpoint = Endpoint(settings)

    async def write(self, question: str, max_new_tokens: int) -> Said:
        """Its words."""
        return await _answered(self.endpoint.write(question, max_new_tokens))

    async def label_logps(self, question: str, labels: Sequence[str]) -> Said:
        """Log-probs of labels as the start of its answer."""
        return await _answered(self.endpoint.label_logps(question, labels))


async def _answered(answer: Awaitable[Said]) -> Said:
    try:
        return await answer
    except EndpointError as error:
        raise Refused(503, str(error), retry_after=None if error.hopeless else 5) from None


def _asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


class Judge:
    """A judge with its templates.

    Args:
        name: in requests.
        writer: who answers.
        settings: mode, templates, length of an explanation.
    """

    def __init__(self, name: str, writer: Writer, settings: JudgeService):
        self.name = name
        self.writer = writer
        self.settings = settings

    async def __call__(self, request: JudgeRequest) -> list[Verdict]:
        """A verdict on each question.

        Raises:
            Refused: another judge is meant, a template lacks a response, or the mode cannot do what is asked.
        """
        if request.model is not None and request.model != self.name:
            raise Refused(404, f"there is no judge {request.model!r}: there is {self.name!r}", "model")
        mode = request.mode or self.settings.mode
        questions = request.questions()
        texts = [self._template(request, question) for question in questions]
        if mode == "logprob" and any(len(question.responses) == 1 for question in questions):
            if request.mode:
                raise Refused(422, "mode=logprob compares two labels, a grade has ten: use mode=text", "mode")
            mode = "text"
        asked = zip(questions, texts, strict=True)
        return await together(*(self._verdict(question, text, mode) for question, text in asked))

    def _template(self, request: JudgeRequest, question: Question) -> str:
        folder = Path(self.settings.templates) if self.settings.templates else None
        text = request.template or prompts.template(request.criterion or "helpful", len(question.responses) == 1, folder)
        lacking = prompts.missing(text, len(question.responses))
        if lacking:
            names = " and ".join(f"{{{name}}}" for name in sorted(lacking))
            raise Refused(422, f"the template lacks {names}: the judge would not see what it judges", "template")
        if prompts.repeated(text):
            raise Refused(
                422, f"the template repeats {', '.join(sorted(prompts.repeated(text)))}: each place may be there once", "template"
            )
        return text

    async def _verdict(self, question: Question, text: str, mode: str) -> Verdict:
        messages = [message.plain() for message in question.messages]
        a, *others = question.responses
        if not others:
            said = await self.writer.write(prompts.fill(text, messages, [a], "grade"), self.settings.max_new_tokens)
            return Verdict(grade=read_grade(said.text, said.cut), explanation=said.text, usage=_usage(said))
        orders = [prompts.fill(text, messages, order, mode) for order in ((a, others[0]), (others[0], a))]
        given: Reading
        if mode == "text":
            answers = await together(*(self.writer.write(order, self.settings.max_new_tokens) for order in orders))
            given, other = (read_pair(said.text, said.cut) for said in answers)
            explanation = answers[0].text
        else:
            answers = await together(*(self.writer.label_logps(order, ("A", "B")) for order in orders))
            (given, first), (other, second) = (read_probabilities(said.logps or ()) for said in answers)
            explanation = f"the first response is better with probability {first:.3f}; {1 - second:.3f} where it is shown second"
        readings = [given, turned(other)]
        spent = Usage.summed([_usage(said) for said in answers])
        return Verdict(winner=winner(readings), verdicts=readings, explanation=explanation, usage=spent)


def _usage(said: Said) -> Usage:
    return Usage.of(said.read, said.written)
