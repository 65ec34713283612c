"""The HTTP gateway: a FastAPI application over a `Service`. It holds no model; it checks, asks and answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from pipelines.serving import protocol, reward_protocol
from pipelines.serving.backends import together
from pipelines.serving.completion_protocol import (
    Answer,
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    Logprobs,
    TextChoice,
)
from pipelines.serving.door import Access, Door
from pipelines.serving.edge import BodyLimit
from pipelines.serving.judging import Judge
from pipelines.serving.metrics import Metrics
from pipelines.serving.protocol import Message, as_list
from pipelines.serving.refusal import Refused, invalid
from pipelines.serving.rewards import Answered
from pipelines.serving.samples import Sample
from pipelines.serving.service import Service, squashed
from pipelines.serving.settings import Limits

T = TypeVar("T")
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorResponse, "description": why}
    for status, why in {
        400: "the body is no JSON",
        401: "no API key, or a wrong one",
        404: "no such model",
        413: "the body is too long",
        422: "a field is wrong, or beyond its limit",
        503: "a queue is full, or a model is starting: see Retry-After",
        504: "it took too long",
    }.items()
}


def build(
    service: Service, judge: Judge | None, access: Access, limits: Limits, ready: Callable[[], Awaitable[dict[str, str]]], metrics: Metrics
) -> FastAPI:
    """The application.

    Args:
        service: rewards and samples.
        judge: compares responses; None for a service without.
        access: keys and time limit.
        limits: what a request may ask.
        ready: the state of every deployment, "ready" or what it is instead.
        metrics: counts requests.
    """
    # /docs with its scripts in the service itself: many clusters have no internet.
    app = FastAPIOffline(
        title="Best-of-N, rewards and judges",
        version=metadata.version("gsil-ray"),
        description="Responses chosen by reward models, the rewards themselves, and verdicts on pairs of responses.",
        responses=ERRORS,
    )
    _errors(app)

    async def within(work: Awaitable[T], since: float | None = None) -> T:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at((since or loop.time()) + access.timeout):
                return await work
        except TimeoutError:
            raise Refused(504, f"the request took longer than {access.timeout:g} s, and was stopped") from None

    @app.post("/v1/chat/completions", response_model=ChatCompletion, tags=["OpenAI"])
    async def chat_completions(request: ChatCompletionRequest) -> Any:
        """A response to a conversation; the best of `best_of_n` samples by a reward model."""
        check(limits, request)
        prompt = conversation(request.messages)
        if request.stream:
            return await _streamed(within, service, metrics, prompt, request)
        best = await within(service.best_of_n(prompt, request))
        metrics.sampled(best.usage, best.rewards)
        choices = []
        for i, (s, r) in enumerate(zip(best.samples, best.rewards, strict=True)):
            told = None if s.tokens is None else Logprobs.of(s.tokens)
            choices.append(ChatChoice(index=i, finish_reason=_finish(s), reward=r, message=Answer(content=s.text), logprobs=told))
        return ChatCompletion(model=best.model, choices=choices, usage=best.usage)

    @app.post("/v1/completions", response_model=Completion, tags=["OpenAI"])
    async def completions(request: CompletionRequest) -> Any:
        """A continuation of bare text or tokens; the best of `best_of_n` samples by a reward model."""
        check(limits, request)
        prompts = request.prompts()
        if not prompts:
            raise Refused(422, "prompt is empty", "prompt")
        if request.stream:
            if len(prompts) > 1:
                raise Refused(422, f"a stream has one prompt, not {len(prompts)}", "prompt")
            return await _streamed(within, service, metrics, prompts[0], request)
        found = await within(together(*(service.best_of_n(prompt, request) for prompt in prompts)))
        for best in found:
            metrics.sampled(best.usage, best.rewards)
        flat = [(s, r) for best in found for s, r in zip(best.samples, best.rewards, strict=True)]
        choices = [TextChoice(index=i, finish_reason=_finish(s), reward=r, text=s.text) for i, (s, r) in enumerate(flat)]
        usage = protocol.Usage.summed(best.usage for best in found)
        return Completion(model=found[0].model, choices=choices, usage=usage)

    async def rewarded(request: Any, cut: bool = False) -> tuple[str, Any, protocol.Usage]:
        # Before the items are made: a conversation is written out once for every document.
        (inputs, turns), (field, spoken) = request.size(), request.fields()
        if not inputs:
            raise Refused(422, f"{field} is empty", field)
        most(limits.batch, inputs, "inputs", field)
        most(limits.messages, turns, "turns", spoken)
        name = service.reward_models.choose(request.model)
        items = request.items()
        if cut and turns and items[0][-1]["role"] == "assistant":
            items = [Answered(item[:-1], item[-1]["content"], ended=False) for item in items]
        try:
            found = await within(service.reward_models.rewards(name, items, request.normalize))
        except Refused as refused:
            # A reward model does not know where the request has what it is given.
            refused.param = {"input": field, "messages": spoken}.get(refused.param or "", refused.param)
            raise
        usage = protocol.Usage.of(sum(found.tokens))
        metrics.sampled(usage, found.values)
        return name, found, usage

    @app.post("/classify", response_model=reward_protocol.ClassifyResponse, tags=["rewards"])
    async def classify(request: reward_protocol.ClassifyRequest) -> Any:
        """Rewards of whole conversations, in vLLM's shape."""
        name, found, usage = await rewarded(request, cut=request.continue_final_message)
        data = [reward_protocol.Classified(index=i, label="LABEL_0", probs=[v]) for i, v in enumerate(shown(request, found.values))]
        return reward_protocol.ClassifyResponse(model=name, data=data, usage=usage)

    @app.post("/v1/score", include_in_schema=False)
    @app.post("/score", response_model=reward_protocol.ScoreResponse, tags=["rewards"])
    async def score(request: reward_protocol.ScoreRequest) -> Any:
        """Rewards of answers to questions, in vLLM's shape."""
        name, found, usage = await rewarded(request)
        data = [reward_protocol.Score(index=i, score=v) for i, v in enumerate(shown(request, found.values))]
        return reward_protocol.ScoreResponse(model=name, data=data, usage=usage)

    @app.post("/v1/rerank", include_in_schema=False)
    @app.post("/v2/rerank", include_in_schema=False)
    @app.post("/rerank", response_model=reward_protocol.RerankResponse, tags=["rewards"])
    async def rerank(request: reward_protocol.RerankRequest) -> Any:
        """Answers to a question, the best first, in vLLM's shape."""
        name, found, usage = await rewarded(request)
        values = shown(request, found.values)
        order = sorted(range(len(values)), key=lambda number: -found.values[number])[: request.top_n or None]
        results = [
            reward_protocol.Ranked(index=i, document=reward_protocol.Document(text=request.documents[i]), relevance_score=values[i])
            for i in order
        ]
        return reward_protocol.RerankResponse(model=name, usage=usage, results=results)

    @app.post("/get_reward", response_model=reward_protocol.GetRewardResponse, tags=["rewards"])
    async def get_reward(request: reward_protocol.GetRewardRequest) -> Any:
        """Rewards in the shape that OpenRLHF's and verl's trainers ask of a remote reward model."""
        _, found, _ = await rewarded(request)
        return reward_protocol.GetRewardResponse(
            rewards=found.values,
            scores=[squashed(v) for v in found.values],
            extra_logs={"tokens": [float(count) for count in found.tokens]},
        )

    @app.post("/v1/judge", response_model=reward_protocol.JudgeResponse, tags=["judge"])
    async def verdict(request: reward_protocol.JudgeRequest) -> Any:
        """Which of two responses is better, asked in both orders; or a grade from 1 to 10."""
        questions = request.questions()
        most(limits.judge_batch, len(questions), "questions", "batch")
        for number, question in enumerate(questions):
            most(limits.messages, len(question.messages), "turns", f"batch.{number}.messages" if request.batch else "messages")
        if not judge:
            raise Refused(404, "this service has no judge", "model")
        found = await within(judge(request))
        usage = protocol.Usage.summed(verdict.usage for verdict in found)
        metrics.judged(usage)
        if request.batch:
            return reward_protocol.JudgeResponse(model=judge.name, data=found, usage=usage)
        return reward_protocol.JudgeResponse(model=judge.name, **found[0].model_dump())

    @app.get("/v1/models", response_model=protocol.ModelList, tags=["service"])
    async def models() -> Any:
        """All models that are served."""
        cards = {card.id: card for card in await within(service.models())}
        if judge:
            here = cards.pop(judge.name, None)
            cards[judge.name] = protocol.ModelCard(id=judge.name, kind="judge", max_model_len=here.max_model_len if here else None)
        return protocol.ModelList(data=list(cards.values()))

    @app.get("/v1/models/{name}", response_model=protocol.ModelCard, tags=["service"])
    async def model(name: str) -> Any:
        """One of them."""
        found = {card.id: card for card in (await models()).data}
        if name not in found:
            raise Refused(404, f"there is no model {name!r}: there are {', '.join(found)}", "model")
        return found[name]

    @app.get("/health", tags=["service"])
    async def health() -> JSONResponse:
        """200 when every deployment answers, else 503 with those that do not."""
        states = await ready()
        return JSONResponse(states, status_code=200 if all(state == "ready" for state in states.values()) else 503)

    @app.get("/metrics", tags=["service"])
    async def prometheus() -> Response:
        """Counts and histograms for Prometheus."""
        return Response(*metrics.exposition())

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    app.add_middleware(BodyLimit, limit=limits.body_bytes)
    app.add_middleware(Door, access=access, metrics=metrics, paths={getattr(route, "path", "") for route in app.routes})
    return app


def refusal(refused: Refused) -> JSONResponse:
    """An answer other than 200."""
    return JSONResponse(refused.body(), refused.status, refused.headers())


def _errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def _refused(request: Request, error: Refused) -> JSONResponse:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        body = request.scope["endpoint"].__annotations__.get("request")
        return refusal(invalid(error.errors(), body.model_fields if body else ()))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        answer = refusal(Refused(error.status_code, str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer


def conversation(messages: Sequence[Message]) -> list[dict[str, str]]:
    """As chat templates read it."""
    return [message.plain() for message in messages]


def most(limit: int, given: int, what: str, field: str) -> None:
    """Raises Refused beyond a limit."""
    if given > limit:
        raise Refused(422, f"{field}: {given} {what}, the limit is {limit}", field)


def check(limits: Limits, request: ChatCompletionRequest | CompletionRequest) -> None:
    """Raises Refused where a request to the policy asks for more than it may."""
    most(limits.n, request.draws(), "samples", "best_of_n" if request.best_of_n else "n")
    most(limits.max_new_tokens, request.most_tokens() or 0, "tokens", request.limit_name())
    if isinstance(request, ChatCompletionRequest):
        most(limits.messages, len(request.messages), "turns", "messages")
    else:
        most(limits.batch, len(as_list(request.prompt)) * request.draws(), "prompts times samples", "prompt")


def shown(request: reward_protocol.Rewarded, values: list[float]) -> list[float]:
    """Rewards as they were asked for."""
    return values if request.use_activation is False else [squashed(value) for value in values]


def _finish(sample: Sample) -> Any:
    return "length" if sample.finish_reason == "length" else "stop"


async def _streamed(
    within: Any, service: Service, metrics: Metrics, prompt: Any, request: ChatCompletionRequest | CompletionRequest
) -> StreamingResponse:
    """Server-sent events. The first piece is waited for: what is wrong with a request is then told by the status."""
    chat = isinstance(request, ChatCompletionRequest)
    since = asyncio.get_running_loop().time()
    pieces = service.stream(prompt, request)
    first = await within(anext(pieces), since)
    kind = ChatCompletion if chat else Completion
    whole = kind(model=service.writer(request), choices=[], usage=protocol.Usage())
    head = whole.model_dump(include={"id", "created", "model"})
    head["object"] = "chat.completion.chunk" if chat else "text_completion"

    async def events() -> AsyncIterator[str]:
        piece, role = first, {"role": "assistant"}
        sample, reward, usage = first
        try:
            while piece:
                sample, reward, usage = piece
                said = {"delta": role | {"content": sample.text}} if chat else {"text": sample.text}
                yield _event(head | {"choices": [{"index": 0, **said, "finish_reason": sample.finish_reason, "reward": reward}]})
                piece, role = await within(anext(pieces, None), since), {}
            if request.stream_options and request.stream_options.include_usage:
                yield _event(head | {"choices": [], "usage": usage.model_dump()})
        except Refused as error:
            yield _event(error.body())
        finally:
            # Of a stream that nobody read to its end, too.
            metrics.sampled(usage, [reward])
            await pieces.aclose()
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
