"""The HTTP gateway over models that cost nothing: shapes, limits, keys, errors."""

import asyncio
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from stub_service import Local, StubPolicy, StubReward, application, client, post

from pipelines.serving import edge, service
from pipelines.serving.door import Access
from pipelines.serving.refusal import Busy
from pipelines.serving.reward_protocol import ClassifyRequest, RerankRequest, ScoreRequest
from pipelines.serving.service import Told
from pipelines.serving.settings import Ensemble, Limits

ASKED = [{"role": "user", "content": "How many?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "Five."}]
TOKENS = len("How many?Five.")


def test_best_of_n_sorts_by_reward_and_counts_every_sample() -> None:
    found = post(application(), "/v1/chat/completions", {"messages": ASKED, "best_of_n": 5, "n": 2}).json()
    assert [choice["message"]["content"].count("word") for choice in found["choices"]] == [5, 4]
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    rewards = [choice["reward"] for choice in found["choices"]]
    assert rewards == sorted(rewards, reverse=True) and rewards[0] == pytest.approx(0.1 * (len("How many?") + 25))
    assert found["usage"] == {"prompt_tokens": 9, "completion_tokens": 75, "total_tokens": 84}


def test_a_plain_completion_asks_nobody_else() -> None:
    found = post(application(rewards=()), "/v1/chat/completions", {"messages": ASKED, "best_of_n": 1}).json()
    assert found["choices"][0]["reward"] is None and found["choices"][0]["message"]["content"] == "word "
    found = post(application(), "/v1/chat/completions", {"messages": ASKED, "reward_model": "reward"}).json()
    assert found["choices"][0]["reward"] == pytest.approx(0.1 * 14)


def test_completions_of_several_prompts() -> None:
    found = post(application(), "/v1/completions", {"prompt": ["ab", "cde"], "best_of_n": 2}).json()
    assert [choice["text"].count("word") for choice in found["choices"]] == [3, 3]
    assert [choice["index"] for choice in found["choices"]] == [0, 1] and found["usage"]["prompt_tokens"] == 5
    found = post(application(), "/v1/completions", {"prompt": [97, 98]}).json()
    assert found["usage"]["prompt_tokens"] == 2


def lines(answer: httpx.Response) -> list[Any]:
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


@pytest.mark.parametrize(("n", "text"), [(1, "one two three"), (5, "word " * 5)])
def test_streams_end_with_the_reward_and_the_usage(n: int, text: str) -> None:
    body = {"messages": ASKED, "best_of_n": n, "stream": True, "reward_model": "reward", "stream_options": {"include_usage": True}}
    *chunks, last = lines(post(application(), "/v1/chat/completions", body))
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text
    assert (
        chunks[-1]["choices"][0]["reward"] == pytest.approx(0.1 * (9 + len(text))) and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    )
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == (13 if n == 1 else 75)
    words = lines(post(application(), "/v1/completions", {"prompt": "ab", "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in words) == "one two three"


def test_the_openai_client() -> None:
    async def work() -> None:
        http = client(application())
        ours = openai.AsyncOpenAI(base_url="http://service/v1", api_key="none", http_client=http)  # type: ignore[arg-type]
        found = await ours.chat.completions.create(model="policy", messages=[{"role": "user", "content": "x"}], extra_body={"best_of_n": 5})
        assert found.choices[0].message.content == "word " * 5 and found.choices[0].reward > 0  # type: ignore[attr-defined]
        assert found.usage and found.usage.completion_tokens == 75
        stream = await ours.chat.completions.create(model="policy", messages=[{"role": "user", "content": "x"}], stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "one two three"
        text = await ours.completions.create(model="policy", prompt="x")
        assert text.choices[0].text == "word "
        assert [model.id async for model in ours.models.list()] == ["policy", "reward", "judge"]
        with pytest.raises(openai.UnprocessableEntityError, match="limit is 64"):
            await ours.chat.completions.create(model="policy", messages=[{"role": "user", "content": "x"}], n=65)

    asyncio.run(work())


def test_rewards_in_the_shapes_of_vllm() -> None:
    app = application()
    raw = post(app, "/classify", {"input": ["ab", "abcd"], "use_activation": False}).json()
    assert [item["probs"] for item in raw["data"]] == [[pytest.approx(0.2)], [pytest.approx(0.4)]] and raw["usage"]["prompt_tokens"] == 6
    squashed = post(app, "/classify", {"input": [97, 98]}).json()
    assert squashed["data"][0]["probs"] == [pytest.approx(1 / (1 + math.exp(-0.2)))]
    normal = post(app, "/classify", {"messages": ANSWERED, "use_activation": False, "normalize": True}).json()
    assert normal["data"][0]["probs"] == [pytest.approx((0.1 * TOKENS - 1) / 2)]
    for names in (("queries", "documents"), ("text_1", "text_2"), ("data_1", "data_2"), ("queries", "items")):
        found = post(app, "/score", {names[0]: "How many?", names[1]: ["Five.", "Fifty."], "use_activation": False}).json()
        assert [item["score"] for item in found["data"]] == [pytest.approx(1.4), pytest.approx(1.5)]
    found = post(app, "/score", {"queries": ASKED, "documents": "Five.", "use_activation": False}).json()
    assert found["data"][0]["score"] == pytest.approx(1.4)
    ranked = post(app, "/rerank", {"query": "How many?", "documents": ["Five.", "Fifty.", "5"], "top_n": 2}).json()
    assert [(item["index"], item["document"]["text"]) for item in ranked["results"]] == [(1, "Fifty."), (0, "Five.")]


def test_rewards_in_the_shape_of_openrlhf() -> None:
    found = post(application(), "/get_reward", {"query": ["ab", "abcd"], "prompts": ["a", "a"], "labels": [None, "4"]}).json()
    assert found["rewards"] == [pytest.approx(0.2), pytest.approx(0.4)] and found["extra_logs"]["tokens"] == [2, 4]
    assert all(0 < score < 1 for score in found["scores"])


def test_an_ensemble_is_one_more_model() -> None:
    app = application(rewards=(StubReward("a", 0.1), StubReward("b", 0.3)), ensemble=Ensemble(name="both", combine="min"))
    for name, value in ((None, 0.2), ("both", 0.2), ("a", 0.2), ("b", 0.6)):
        found = post(app, "/classify", {"input": "ab", "model": name, "use_activation": False}).json()
        assert found["data"][0]["probs"] == [pytest.approx(value)] and found["model"] == (name or "both")
    normal = application(rewards=(StubReward("a"), StubReward("b", 0.3)), ensemble=Ensemble(name="both", normalised=True))
    found = post(normal, "/classify", {"input": "ab", "use_activation": False}).json()
    assert found["data"][0]["probs"] == [pytest.approx(((0.2 - 1) / 2 + (0.6 - 1) / 2) / 2)]
    refused = post(application(rewards=(StubReward(centre=None),)), "/classify", {"input": "ab", "normalize": True})
    assert refused.status_code == 422 and "stores no mean" in refused.json()["error"]["message"]


def test_the_judge_is_asked_in_both_orders() -> None:
    app = application()
    found = post(app, "/v1/judge", {"messages": ASKED, "responses": ["Five, as one can see from the text. " * 4, "5"]}).json()
    assert found["winner"] == 0 and found["verdicts"] == [0, 0] and "[[A]]" in found["explanation"]
    found = post(app, "/v1/judge", {"messages": ASKED, "responses": ["a", "b"], "mode": "logprob"}).json()
    assert found["winner"] == "tie" and found["verdicts"] == [0, 1], "it prefers whatever is shown first"
    found = post(app, "/v1/judge", {"messages": ASKED, "responses": ["Five."], "criterion": "mt_bench"}).json()
    assert found["grade"] == 7 and found["winner"] is None
    batch = [{"messages": ASKED, "responses": ["Five."]}, {"messages": ASKED, "responses": ["a", "b"]}]
    found = post(app, "/v1/judge", {"batch": batch}).json()
    assert found["data"][0]["grade"] == 7 and found["data"][1]["winner"] == "tie"
    refused = post(app, "/v1/judge", {"messages": ASKED, "responses": ["a", "b"], "template": "{first}?"})
    assert refused.status_code == 422 and "{second}" in refused.json()["error"]["message"]


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
    ("/v1/chat/completions", {"messages": ASKED, "tools": []}, 422, "tools"),
    ("/v1/chat/completions", {"messages": ASKED, "stream": True, "n": 2}, 422, "stream"),
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
    for path, body in (("/v1/completions", {"prompt": [None] * 5 * 10**5}), ("/get_reward", {"query": [None] * 5 * 10**5})):
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


def test_health_says_who_is_not_ready() -> None:
    async def ready() -> dict[str, str]:
        return {"policy": "ready", "reward-a": "updating"}

    async def work() -> httpx.Response:
        async with client(application(ready=ready)) as http:
            return await http.get("/health")

    answer = asyncio.run(work())
    assert answer.status_code == 503 and answer.json()["reward-a"] == "updating"


def test_metrics_count_by_declared_paths_only() -> None:
    app = application()
    post(app, "/classify", {"input": "ab"})
    post(app, "/classify", {"input": ""})
    post(app, "/nowhere/7", {})

    async def work() -> str:
        async with client(app) as http:
            return (await http.get("/metrics")).text

    text = asyncio.run(work())
    assert 'gsil_requests_total{route="/classify",status="200"} 1.0' in text
    assert 'gsil_errors_total{route="other",status="404"} 1.0' in text and "nowhere" not in text
    assert 'gsil_tokens_total{kind="prompt"} 2.0' in text and "gsil_reward_bucket" in text and "gsil_queue_length" in text


def test_the_gateways_processes_count_together(tmp_path: Path) -> None:
    program = """
from pipelines.serving.metrics import Metrics
metrics = Metrics()
metrics.came()
metrics.came()
metrics.answered("/classify", 200, 0.1)
print(metrics.exposition()[0].decode())
"""
    texts = [
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}, capture_output=True, text=True
        ).stdout
        for _ in range(3)
    ]
    assert 'gsil_requests_total{route="/classify",status="200"} 3.0' in texts[-1]
    assert "gsil_running 1.0" in texts[-1], "those of ended processes are over"


def test_every_field_is_described_with_an_example_or_a_default() -> None:
    schema = application().openapi()
    for name, body in schema["components"]["schemas"].items():
        for field, value in body.get("properties", {}).items():
            assert value.get("description"), f"{name}.{field}"
            inside = value | value.get("items", {})
            shown = any(key in inside for key in ("examples", "default", "const", "enum", "$ref")) or value.get("type") == "null"
            assert shown, f"{name}.{field} has no example: {value}"
