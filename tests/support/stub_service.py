"""Models that cost nothing, behind the real gateway."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import httpx

from pipelines.serving.door import Access
from pipelines.serving.gateway import build
from pipelines.serving.judging import Judge, LocalWriter
from pipelines.serving.metrics import Metrics
from pipelines.serving.prompts import About, checked, field_of
from pipelines.serving.rewards import Answered, Rewards
from pipelines.serving.samples import Draw, Labels, Sample, Samples, Token
from pipelines.serving.service import RewardModels, Service
from pipelines.serving.settings import Ensemble, JudgeService, Limits

CONTEXT = 200


class Local:
    """What `Remote` is for a deployment, for an object."""

    def __init__(self, model: Any):
        self.model = model

    async def call(self, method: str, *args: Any) -> Any:
        return await getattr(self.model, method)(*args)

    async def stream(self, method: str, *args: Any) -> AsyncIterator[Any]:
        async for item in getattr(self.model, method)(*args):
            yield item


def ids_of(given: Any) -> list[int]:
    """A byte is a token."""
    if isinstance(given, Answered):
        given = [*given.messages, {"role": "assistant", "content": given.response}]
    if isinstance(given, str):
        return list(given.encode())
    if given and isinstance(given[0], dict):
        return [byte for message in given for byte in message["content"].encode()]
    return list(given)


class StubReward:
    """The longer, the better."""

    def __init__(
        self,
        name: str = "reward",
        factor: float = 0.1,
        centre: tuple[float, float] | None = (1.0, 2.0),
        tokenizer: str = "bytes",
        chat: str = "",
    ):
        self.name, self.factor, self.centre, self.tokenizer, self.chat = name, factor, centre, tokenizer, chat
        self.seen: list[Any] = []

    async def about(self) -> About:
        return About(self.name, CONTEXT, self.tokenizer, self.centre, self.chat)

    async def rewards(self, items: Sequence[Any]) -> Rewards:
        self.seen += items
        rows = [checked(ids_of(item), f"input {number}", "input", CONTEXT, 256) for number, item in enumerate(items)]
        return Rewards([self.factor * len(row) for row in rows], [len(row) for row in rows])


class StubPolicy:
    """Answers with 1, 2, 3 ... words; a judge's question with a verdict by length."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.asked = 0
        self.pause = 0.0

    async def about(self) -> About:
        return About("policy", CONTEXT, "bytes")

    async def sample(self, prompt: Any, draw: Draw) -> Samples:
        self.asked += 1
        try:
            await asyncio.sleep(self.pause)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        prompt_ids = checked(ids_of(prompt), "the prompt", field_of(prompt), 10 * CONTEXT, 256)
        # The longest in the middle, so that the best is not the first.
        texts = ["word " * (1 + (number * 7) % 5) for number in range(draw.n)]
        if "[[A]]" in str(prompt):
            asked = prompt[0]["content"]
            first, second = asked.split("<response A>")[1].split("<response B>") if "<response B>" in asked else ("", "")
            texts = ["Longer. [[A]]" if len(first) > len(second) - 100 else "Longer. [[B]]"]
        if "[[5]]" in str(prompt):
            texts = ["Not bad. [[7]]"]
        tokens = None if draw.top_logprobs is None else (Token("A", -0.5, (("A", -0.5), ("B", -1.0))[: draw.top_logprobs]),)
        return Samples(prompt_ids, [Sample(text, list(text.encode()), "stop", tokens=tokens) for text in texts])

    async def stream(self, prompt: Any, draw: Draw) -> AsyncIterator[Samples]:
        prompt_ids = ids_of(prompt)
        for number, word in enumerate(("one", " two", " three")):
            await asyncio.sleep(self.pause)
            yield Samples(prompt_ids, [Sample(word, list(word.encode()), "stop" if number == 2 else None)])

    async def label_logps(self, prompt: Any, labels: Sequence[str]) -> Labels:
        return Labels(ids_of(prompt), [-1.0, -2.0])


def application(
    policy: StubPolicy | None = None,
    limits: Limits | None = None,
    access: Access | None = None,
    rewards: Sequence[StubReward] = (StubReward(),),
    ensemble: Ensemble | None = None,
    judge: bool = True,
    ready: Callable[[], Awaitable[dict[str, str]]] | None = None,
) -> Any:
    """The gateway over stubs."""
    policy = policy or StubPolicy()
    limits = limits or Limits()

    async def all_ready() -> dict[str, str]:
        return {"policy": "ready"}

    models = RewardModels({reward.name: Local(reward) for reward in rewards}, ensemble or Ensemble())
    writers = {"policy": Local(policy)} | ({"judge": Local(policy)} if judge else {})
    service = Service(writers, models)
    judging = Judge("judge", LocalWriter(writers["judge"]), JudgeService()) if judge else None
    return build(service, judging, access or Access(), limits, ready or all_ready, Metrics())


def client(app: Any) -> httpx.AsyncClient:
    """In this process."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")


def post(app: Any, path: str, body: Any, **options: Any) -> httpx.Response:
    """One request."""

    async def work() -> httpx.Response:
        async with client(app) as http:
            if isinstance(body, (bytes, str)):
                return await http.post(path, content=body, headers={"content-type": "application/json"}, **options)
            return await http.post(path, json=body, **options)

    return asyncio.run(work())
