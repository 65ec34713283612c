"""The client: batches, retries, errors."""

import asyncio
from typing import Any

import httpx
import pytest
from stub_service import StubReward, application

from pipelines import client
from pipelines.client import AsyncClient, ServiceError
from pipelines.serving.rewards import Answered


def against(transport: Any, **options: Any) -> AsyncClient:
    ours = AsyncClient("http://service", **options)
    ours.http = httpx.AsyncClient(transport=transport, base_url="http://service")
    return ours


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []

    async def noted(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(client.asyncio, "sleep", noted)
    return waits


def test_rewards_come_in_the_order_given() -> None:
    said = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]
    ours = against(httpx.ASGITransport(application()), batch=2)
    values = asyncio.run(ours.rewards(["a", said, [97, 98], "abcd", "ab"]))
    assert values == [pytest.approx(0.1 * count) for count in (1, 5, 2, 4, 2)]


def test_a_cut_response_is_not_ended() -> None:
    said = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]
    reward = StubReward()
    seen: list[Any] = []
    real = reward.rewards

    async def noted(items: Any) -> Any:
        seen.extend(items)
        return await real(items)

    reward.rewards = noted  # type: ignore[method-assign]
    app = application(rewards=[reward])
    assert asyncio.run(against(httpx.ASGITransport(app)).rewards([said], cut=True)) == [pytest.approx(0.5)]
    assert seen == [Answered(said[:1], "de", ended=False)]


def test_best_of_n_and_the_judge() -> None:
    asked = [{"role": "user", "content": "abc"}]
    text, reward = asyncio.run(against(httpx.ASGITransport(application())).best_of_n(asked, 5))
    assert text == "word " * 5 and reward == pytest.approx(2.8)
    verdict = asyncio.run(against(httpx.ASGITransport(application())).judge(asked, "a", "b", mode="logprob"))
    assert verdict["winner"] == "tie"


def test_full_queues_and_broken_connections_are_tried_again(no_waiting: list[float]) -> None:
    answers = [503, None, 503, 200]

    def reply(request: httpx.Request) -> httpx.Response:
        status = answers.pop(0)
        if status is None:
            raise httpx.ConnectError("gone")
        return httpx.Response(status, json={"data": [{"probs": [1.5]}]}, headers={"retry-after": "3"} if status == 503 else {})

    assert asyncio.run(against(httpx.MockTransport(reply)).rewards(["a"])) == [1.5]
    assert len(no_waiting) == 3 and no_waiting[0] >= 3 * 0.75 and no_waiting[1] < 1


def test_what_is_wrong_is_said_once(no_waiting: list[float]) -> None:
    nothing: list[Any] = ["", []]
    for empty in nothing:
        with pytest.raises(ServiceError, match=r"/classify answers 422: input 0 is empty"):
            asyncio.run(against(httpx.ASGITransport(application())).rewards([empty]))
    assert not no_waiting
    with pytest.raises(ServiceError, match="does not answer, tried 3 times: full"):
        asyncio.run(
            against(httpx.MockTransport(lambda _: httpx.Response(503, json={"error": {"message": "full"}})), retries=2).rewards(["a"])
        )
