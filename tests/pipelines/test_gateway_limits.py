"""The HTTP gateway under load and abuse: what is refused, with which words, and at what cost."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from stub_service import Local, StubPolicy, StubReward, application, client, post

from pipelines.serving import edge, service
from pipelines.serving.door import Access
from pipelines.serving.refusal import Busy
from pipelines.serving.reward_protocol import ClassifyRequest, RerankRequest, ScoreRequest
from pipelines.serving.service import Told
from pipelines.serving.settings import Limits

ASKED = [{"role": "user", "content": "How many?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "Five."}]
TOKENS = len("How many?Five.")


LONG = "a" * 201
FIELDS: list[tuple[str, Any, str]] = [
    ("/classify", {"input": []}, "input"),
    ("/classify", {"input": [], "continue_final_message": True}, "input"),
    ("/classify", {"input": [[]], "continue_final_message": True}, "input"),
    ("/classify", {"input": [[]]}, "input"),
    ("/classify", {"input": [LONG]}, "input"),
    ("/classify", {"messages": [{"role": "user", "content": LONG}, ANSWERED[1]]}, "messages"),
    ("/score", {"queries": "a", "documents": ["a", LONG]}, "documents"),
    ("/score", {"queries": "a", "documents": ["a"] * 257}, "documents"),
    ("/score", {"queries": ASKED * 257, "documents": ["a"]}, "queries"),
    ("/rerank", {"query": "a", "documents": [LONG]}, "documents"),
    ("/rerank", {"query": ASKED * 257, "documents": ["a"]}, "query"),
    ("/get_reward", {"query": ["a", LONG]}, "query"),
    ("/get_reward", {"query": ["a"] * 257}, "query"),
    ("/get_reward", {"query": ["a", ""]}, "query"),
    ("/v1/completions", {"prompt": "a" * 2001}, "prompt"),
    ("/v1/completions", {"prompt": [97] * 2001}, "prompt"),
    ("/v1/completions", {"prompt": LONG, "best_of_n": 2}, "prompt"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 1025}, "max_tokens"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 2001}]}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}], "best_of_n": 2}, "messages"),
    ("/v1/chat/completions", {"messages": ASKED, "max_completion_tokens": 1025}, "max_completion_tokens"),
    ("/v1/chat/completions", {"messages": ASKED, "max_tokens": 1025}, "max_tokens"),
    ("/v1/chat/completions", {"messages": ASKED, "best_of_n": 2, "reward_model": "other"}, "reward_model"),
    ("/v1/judge", {"messages": ASKED, "responses": ["a", ""]}, "responses.1"),
    ("/v1/judge", {"messages": ASKED, "responses": [""]}, "responses.0"),
    ("/v1/judge", {"messages": ASKED * 257, "responses": ["a", "b"]}, "messages"),
    ("/v1/judge", {"batch": [{"messages": ASKED * k, "responses": ["a", "b"]} for k in (1, 257)]}, "batch.1.messages"),
    ("/v1/judge", {"batch": [{"messages": ASKED, "responses": ["", ""]}]}, "batch.0.responses.0"),
]


@pytest.mark.parametrize(("path", "body", "field"), FIELDS, ids=[f"{path[1:]}-{number}" for number, (path, *_) in enumerate(FIELDS)])
def test_the_field_that_is_wrong_is_named(path: str, body: Any, field: str) -> None:
    answer = post(application(), path, body)
    assert answer.json()["error"]["param"] == field and answer.status_code in (404, 422), answer.text


BAD: list[tuple[str, Any, int, str]] = [
    ("/v1/chat/completions", "{", 400, ""),
    ("/v1/chat/completions", b"\xff\xfe", 400, ""),
    ("/v1/chat/completions", "[]", 422, ""),
    ("/v1/chat/completions", {"messages": []}, 422, "messages"),
    ("/v1/chat/completions", {"messages": ASKED, "best_of_n": 0}, 422, "best_of_n"),
    ("/v1/chat/completions", {"messages": ASKED, "best_of_n": 10**9}, 422, "64"),
    ("/v1/chat/completions", {"messages": ASKED, "n": 3, "best_of_n": 2}, 422, "n=3"),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 422, "temperature"),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "\\ud800"}]}', 422, "content"),
    ("/v1/chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}, 422, "role"),
    ("/v1/chat/completions", {"messages": ASKED, "max_tokens": 10**6}, 422, "1024"),
    ("/v1/chat/completions", {"messages": ASKED * 300}, 422, "256"),
    ("/v1/chat/completions", {"messages": ASKED, "model": "gpt"}, 404, "policy"),
    ("/v1/chat/completions", {"messages": ASKED, "best_of_n": 2, "reward_model": "other"}, 404, "reward"),
    ("/v1/chat/completions", {"messages": ASKED, "tools": [{"type": "function"}]}, 422, "tools"),
    ("/v1/chat/completions", {"messages": ASKED, "stream": True, "n": 2}, 422, "stream"),
    ("/v1/chat/completions", {"messages": ASKED, "top_logprobs": 3}, 422, "needs logprobs=true"),
    ("/v1/chat/completions", {"messages": ASKED, "logprobs": True, "top_logprobs": 21}, 422, "top_logprobs"),
    ("/v1/chat/completions", {"messages": ASKED, "logprobs": True, "stream": True}, 422, "a stream carries none"),
    ("/v1/chat/completions", {"messages": ASKED, "model": "reward"}, 404, "'policy' and 'judge'"),
    ("/v1/completions", {"prompt": []}, 422, "prompt"),
    ("/v1/completions", {"prompt": [-1]}, 422, "prompt"),
    ("/v1/completions", {"prompt": ["a"] * 300}, 422, "256"),
    ("/classify", {"input": "a" * 201}, 422, "200"),
    ("/classify", {"input": ""}, 422, "empty"),
    ("/classify", {"input": [300]}, 422, "vocabulary"),
    ("/classify", {"input": ["a"] * 257}, 422, "256"),
    ("/classify", {}, 422, "input or messages"),
    ("/classify", {"input": "a", "model": "x"}, 404, "x"),
    ("/score", {"queries": ["a", "b"], "documents": ["c"]}, 422, "pairs"),
    ("/rerank", {"query": "a", "documents": []}, 422, "documents"),
    ("/get_reward", {"query": []}, 422, "query"),
    ("/v1/judge", {"messages": ASKED, "responses": ["a", "b", "c"]}, 422, "responses"),
    ("/v1/judge", {"messages": ASKED}, 422, "batch"),
    ("/v1/judge", {"messages": ASKED, "responses": ["a"], "mode": "logprob"}, 422, "mode"),
]


@pytest.mark.parametrize(("path", "body", "status", "said"), BAD, ids=[f"{path[1:]}-{number}" for number, (path, *_) in enumerate(BAD)])
def test_bad_requests_are_told_what_is_wrong(path: str, body: Any, status: int, said: str) -> None:
    answer = post(application(), path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status and said in error["message"]


def test_all_that_is_wrong_is_told_with_the_names_that_were_meant() -> None:
    empty = "messages: List should have at least 1 item after validation, not 0"
    answer = post(application(), "/v1/chat/completions", {"messages": [], "tmperature": 1, "x-y": 1})
    assert answer.json()["error"] == {
        "message": f"{empty}; tmperature: there is no such field, did you mean temperature?; x-y: there is no such field",
        "type": "invalid_request_error",
        "param": "messages",
        "code": 422,
    }
    within = {"messages": [{"role": "user", "content": "a", "prefix": True}]}
    told = post(application(), "/v1/chat/completions", within).json()["error"]["message"]
    assert told == "messages.0.prefix: there is no such field"
    answer = post(application(), "/v1/chat/completions", {"messages": []} | {f"x{number}": 1 for number in range(5)})
    message = answer.json()["error"]["message"]
    assert message == f"{empty}; x0: there is no such field; x1: there is no such field (and 3 more)"


def test_json_that_is_not_sent_as_json_is_told_which_header() -> None:
    async def work(headers: dict[str, str]) -> httpx.Response:
        async with client(application()) as http:
            return await http.post("/classify", content='{"input": "a"}', headers=headers)

    # As curl -d sends it.
    for headers in ({"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}, {}):
        answer = asyncio.run(work(headers))
        assert answer.status_code == 422 and "send the header Content-Type: application/json" in answer.json()["error"]["message"]


def test_a_body_beyond_the_limit_is_not_read() -> None:
    app = application(limits=Limits(body_bytes=2000))
    answer = post(app, "/classify", {"input": "a" * 3000})
    assert answer.status_code == 413 and "2000 bytes" in answer.json()["error"]["message"]

    async def endless() -> None:
        sent = 0

        async def body() -> Any:
            nonlocal sent
            for _ in range(1000):
                sent += 100
                yield b" " * 100

        async with client(app) as http:
            answer = await http.post("/classify", content=body())
        assert answer.status_code == 413 and sent < 3000

    asyncio.run(endless())


def test_keys_are_asked_for() -> None:
    app = application(access=Access((hashlib.sha256(b"one").hexdigest(), hashlib.sha256(b"two").hexdigest())))
    body = {"input": "ab"}
    assert post(app, "/classify", body).status_code == 401
    assert post(app, "/classify", body, params={"api_key": "one"}).status_code == 401

    async def work(headers: dict[str, str], path: str = "/v1/models") -> int:
        async with client(app) as http:
            return (await http.get(path, headers=headers)).status_code

    assert asyncio.run(work({"Authorization": "Bearer two"})) == 200 == asyncio.run(work({"X-API-Key": "one"}))
    assert asyncio.run(work({"Authorization": "Bearer three"})) == 401 == asyncio.run(work({}, "/metrics"))
    assert all(asyncio.run(work({}, path)) == 200 for path in ("/health", "/", "/docs"))


def test_the_documentation_needs_no_internet_and_no_key() -> None:
    app = application(access=Access((hashlib.sha256(b"one").hexdigest(),)))

    async def work() -> tuple[str, dict[str, int]]:
        async with client(app) as http:
            page = (await http.get("/docs")).text
            parts = re.findall(r"(?:src|href)=[\"']([^\"']+)[\"']|url:\s*[\"']([^\"']+)[\"']", page)
            return page, {part: (await http.get(part)).status_code for part in map("".join, parts)}

    page, parts = asyncio.run(work())
    assert len(parts) >= 3 and set(parts.values()) == {200} and any(part.endswith(".js") for part in parts)
    assert "http://" not in page.replace("http://testserver", "") and "https://" not in page


def test_what_takes_too_long_is_stopped() -> None:
    policy = StubPolicy()
    policy.pause = 5
    answer = post(application(policy=policy, access=Access(timeout=0.1)), "/v1/chat/completions", {"messages": ASKED})
    assert answer.status_code == 504 and policy.cancelled == 1


def test_a_stream_as_a_whole_has_its_time() -> None:
    policy = StubPolicy()
    policy.pause = 0.2
    answer = post(application(policy=policy, access=Access(timeout=0.5)), "/v1/chat/completions", {"messages": ASKED, "stream": True})
    *_, before, error, end, _ = answer.text.split("\n\n")
    assert answer.status_code == 200 and "two" in before and "longer than 0.5 s" in error and end == "data: [DONE]"


def test_a_stream_that_nobody_reads_to_its_end_is_counted() -> None:
    policy = StubPolicy()
    policy.pause = 0.2
    app = application(policy=policy, access=Access(timeout=0.5))
    post(app, "/v1/chat/completions", {"messages": ASKED, "stream": True})

    async def work() -> str:
        async with client(app) as http:
            return (await http.get("/metrics")).text

    assert 'gsil_tokens_total{kind="completion"} 7.0' in asyncio.run(work()), "of 'one two'"


def test_a_conversation_is_not_written_out_for_more_documents_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Any) -> None:
        raise AssertionError("memory of documents times turns")

    many = [{"role": "user", "content": "x"}] * 300
    for kind, path, body in (
        (ScoreRequest, "/score", {"queries": ASKED, "documents": ["a"] * 300}),
        (ScoreRequest, "/v1/score", {"queries": many, "documents": ["a"]}),
        (RerankRequest, "/rerank", {"query": ASKED, "documents": ["a"] * 300}),
        (RerankRequest, "/v2/rerank", {"query": many, "documents": ["a"]}),
        (ClassifyRequest, "/classify", {"messages": many}),
    ):
        monkeypatch.setattr(kind, "items", never)
        answer = post(application(), path, body)
        assert answer.status_code == 422 and "300" in answer.text and "the limit is 256" in answer.text, answer.text


def test_a_million_wrong_things_are_told_as_one() -> None:
    many = {"input": "a"} | {f"x{number}": 1 for number in range(2 * 10**5)}
    nothing = [None] * 5 * 10**5
    for path, body in (("/v1/completions", {"prompt": nothing}), ("/get_reward", {"query": nothing}), ("/classify", many)):
        answer = post(application(), path, body)
        assert answer.status_code == 422 and len(answer.text) < 1000


def test_bodies_that_come_slowly_or_are_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "SECONDS", 0.2)
    monkeypatch.setattr(edge, "BODIES", 2)
    app = application(limits=Limits(body_bytes=1024))

    async def one(pause: float) -> int:
        async def body() -> AsyncIterator[bytes]:
            yield b" " * 1000
            await asyncio.sleep(pause)
            yield b"{"

        async with client(app) as http:
            return (await http.post("/classify", content=body(), headers={"content-type": "application/json"})).status_code

    async def work() -> list[int]:
        return await asyncio.gather(*(one(1.0) for _ in range(3)))

    assert sorted(asyncio.run(work())) == [408, 408, 503]
    assert [asyncio.run(one(0)) for _ in range(3)] == [400] * 3, "places are free again"


def test_samples_wait_for_a_place_in_the_reward_models_queue() -> None:
    reward = StubReward()
    busy = 2
    real = reward.rewards

    async def full(items: Any) -> Any:
        nonlocal busy
        busy -= 1
        if busy >= 0:
            raise Busy(503, "full", retry_after=1)
        return await real(items)

    reward.rewards = full  # type: ignore[method-assign]
    app = application(rewards=[reward])
    assert post(app, "/v1/chat/completions", {"messages": ASKED, "best_of_n": 3}).status_code == 200
    busy = 1
    assert post(app, "/classify", {"input": "ab"}).status_code == 503, "nothing was done for it yet"


def test_a_models_last_word_counts_while_it_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "ABOUT_SECONDS", -1.0)
    reward = StubReward()
    told = Told(Local(reward))
    about = asyncio.run(told())

    async def full() -> Any:
        raise Busy(503, "full", retry_after=1)

    reward.about = full  # type: ignore[method-assign]
    assert asyncio.run(told()) is about
    with pytest.raises(Busy):
        asyncio.run(Told(Local(reward))())


@pytest.mark.parametrize(
    ("raised", "status"),
    [(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), 400), (ValueError("no"), 503), (MemoryError("no room"), 503), (None, 503)],
)
def test_what_a_proxy_fails_over_is_tried_again_unless_the_client_is_to_blame(raised: Exception | None, status: int) -> None:
    async def proxy(*_: Any) -> None:
        if raised:
            raise raised

    answer = post(edge.DeadGateway(proxy), "/classify", {})
    assert answer.status_code == status and ("retry-after" in answer.headers) == (status == 503), answer.text
    assert answer.json()["error"]["code"] == status
