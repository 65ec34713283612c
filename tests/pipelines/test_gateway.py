"""The HTTP gateway over models that cost nothing: shapes, readiness, metrics."""

import asyncio
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from stub_service import StubPolicy, StubReward, application, client, post

from pipelines.serving.rewards import Answered
from pipelines.serving.settings import Ensemble

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


@pytest.mark.parametrize(("tokenizer", "chat"), [("bytes", ""), ("bytes", "other"), ("other", "")])
def test_tokens_are_rewarded_where_they_mean_the_same(tokenizer: str, chat: str) -> None:
    policy, reward = StubPolicy(), StubReward(tokenizer=tokenizer, chat=chat)
    app = application(policy=policy, rewards=(reward,))
    options = {"best_of_n": 2, "max_tokens": 4}
    assert post(app, "/v1/chat/completions", {"messages": ASKED, **options}).status_code == 200
    assert post(app, "/v1/completions", {"prompt": "ab", **options}).status_code == 200
    spoken, text = reward.seen[0], reward.seen[-1]
    assert spoken == (list(b"How many?word ") if (tokenizer, chat) == ("bytes", "") else Answered(ASKED, "word "))
    assert text == (list(b"abword word word ") if tokenizer == "bytes" else "abword word word ")
    for stream in ({}, {"stream": True}):
        for more in ({}, {"stop": "x"}):
            asked = policy.asked
            answer = post(app, "/v1/completions", {"prompt": [97, 98], **options, **stream, **more})
            if tokenizer == "bytes" and not more:
                assert answer.status_code == 200 and reward.seen[-1] == list(b"abword word word ")
                continue
            assert answer.status_code == 422 and policy.asked == asked, "nothing is sampled for nothing"
            assert answer.json()["error"]["param"] == ("stop" if tokenizer == "bytes" else "prompt")


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
        judge = await ours.chat.completions.create(
            model="judge", messages=[{"role": "user", "content": "x"}], max_tokens=1, temperature=0, logprobs=True, top_logprobs=2
        )
        assert judge.model == "judge" and found.choices[0].logprobs is None and judge.choices[0].logprobs
        (said,) = judge.choices[0].logprobs.content or []
        assert (said.token, said.logprob, said.bytes) == ("A", -0.5, [65])
        assert [(other.token, other.logprob) for other in said.top_logprobs] == [("A", -0.5), ("B", -1.0)]
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


def test_what_openais_clients_send_without_asking_for_anything_is_taken() -> None:
    idle = {"n": None, "logprobs": False, "top_logprobs": None, "tools": None, "response_format": {"type": "text"}, "store": False}
    asked = [{"role": "developer", "content": "Be short."}, *ASKED]
    assert post(application(), "/v1/chat/completions", {"messages": asked, "metadata": {}, **idle}).status_code == 200
    turn = openai.types.chat.ChatCompletionMessage(role="assistant", content="Five.", annotations=[]).model_dump()
    assert turn.keys() > {"refusal", "annotations", "tool_calls"}
    for given in (turn, turn | {"name": "somebody"}):
        assert post(application(), "/v1/chat/completions", {"messages": [*ASKED, given, *ASKED]}).status_code == 200
        assert post(application(), "/classify", {"messages": [*ASKED, given]}).status_code == 200
    wrong: list[dict[str, Any]] = [{"tool_calls": [{}]}, {"refusal": "no"}, {"else": 1}]
    for some in wrong:
        answer = post(application(), "/v1/chat/completions", {"messages": [*ASKED, turn | some]})
        assert answer.status_code == 422 and answer.json()["error"]["param"] == f"messages.1.{next(iter(some))}"
    refused: list[dict[str, Any]] = [{"logit_bias": {"5": 1}}, {"tools": [{}]}, {"response_format": {"type": "json_object"}}]
    for more in refused:
        answer = post(application(), "/v1/chat/completions", {"messages": asked, **more})
        assert answer.status_code == 422 and next(iter(more)) in answer.text


def test_a_model_can_be_asked_for_by_its_name() -> None:
    async def work(name: str) -> httpx.Response:
        async with client(application()) as http:
            return await http.get(f"/v1/models/{name}")

    assert asyncio.run(work("reward")).json()["kind"] == "reward"
    missing = asyncio.run(work("other"))
    assert missing.status_code == 404 and "policy" in missing.json()["error"]["message"]


def test_an_ensemble_is_one_more_model() -> None:
    app = application(rewards=(StubReward("a", 0.1), StubReward("b", 0.3)), ensemble=Ensemble(name="both", combine="min"))
    for name, value in ((None, 0.2), ("both", 0.2), ("a", 0.2), ("b", 0.6)):
        found = post(app, "/classify", {"input": "ab", "model": name, "use_activation": False}).json()
        assert found["data"][0]["probs"] == [pytest.approx(value)] and found["model"] == (name or "both")
        assert found["usage"]["prompt_tokens"] == (2 if name in ("a", "b") else 4), "every member reads"
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
    assert found["usage"]["completion_tokens"] == 2 and found["usage"]["prompt_tokens"] > 200, "one token in each order"
    found = post(app, "/v1/judge", {"messages": ASKED, "responses": ["Five."], "criterion": "mt_bench"}).json()
    assert found["grade"] == 7 and found["winner"] is None
    batch = [{"messages": ASKED, "responses": ["Five."]}, {"messages": ASKED, "responses": ["a", "b"]}]
    found = post(app, "/v1/judge", {"batch": batch}).json()
    assert found["data"][0]["grade"] == 7 and found["data"][1]["winner"] == "tie"
    costs = [verdict["usage"]["total_tokens"] for verdict in found["data"]]
    assert min(costs) > 0 and found["usage"]["total_tokens"] == sum(costs)
    refused = post(app, "/v1/judge", {"messages": ASKED, "responses": ["a", "b"], "template": "{first}?"})
    assert refused.status_code == 422 and "{second}" in refused.json()["error"]["message"]


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
