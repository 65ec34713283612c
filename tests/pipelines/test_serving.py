"""The service with real models: a tiny policy and a tiny reward model, from the command to the answers."""

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pyarrow.parquet as pq
import pytest
import torch
from rewards import reward_model
from running import finish, free_ports, ours_alive, wait_until_gone
from serving import listening, replicas_of, service
from tournaments import ROWS, Played
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from actors.judge import prompts
from pipelines.chat import Chat

pytestmark = pytest.mark.slow
http = httpx.Client(timeout=60)
ASKED = [{"role": "user", "content": "how many apples are there?"}]


def labels_of(chat: Chat) -> list[int]:
    """The tokens of a judge's two labels."""
    return [chat.tokenizer(label, add_special_tokens=False).input_ids[0] for label in ("A", "B")]


@pytest.fixture(scope="module")
def policy(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a leaning to both labels of a judge: of random weights they would not be among its likeliest words."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("leaning") / "policy")
    chat, model = Chat(str(tiny)), AutoModelForCausalLM.from_pretrained(tiny).eval()
    with torch.no_grad():
        asked = [chat.prompt_ids([{"role": "user", "content": f"{number} words"}]) for number in range(20)]
        ends = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1] for ids in asked]
        rows = model.get_output_embeddings().weight
        for token in labels_of(chat):
            rows[token] = 0.3 * torch.stack(ends).mean(dim=0) + 0.1 * rows[token]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("served")
    reward = reward_model(folder / "reward", "llama")
    flags = ["--reward.models", f"{{reward: {reward}}}", "--policy.path", policy, "--judge.path", "policy", "--judge.mode", "logprob"]
    sizes = {
        "policy.dtype": "float32",
        "policy.max_model_len": 512,
        "reward.max_model_len": 512,
        "policy.kv_cache_gib": 0.1,
        "reward.kv_cache_gib": 0.1,
        "ray.num_cpus": 4,
    }
    flags += [part for key, value in sizes.items() for part in (f"--{key}", value)]
    with service(folder, *flags) as url:
        yield url, reward
        assert ours_alive(folder)
    wait_until_gone(folder)


def test_rewards_are_those_of_transformers(served: tuple[str, Path]) -> None:
    url, reward = served
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(reward).eval(), AutoTokenizer.from_pretrained(reward)
    said = [*ASKED, {"role": "assistant", "content": "there are 12 apples."}]
    ids = tokenizer.apply_chat_template(said, return_dict=False)
    with torch.no_grad():
        expected = float(model(torch.tensor([ids])).logits)
    for body in ({"messages": said}, {"input": ids}, {"input": [ids, ids[:5]]}):
        answer = http.post(f"{url}/classify", json=body | {"use_activation": False})
        assert answer.json()["data"][0]["probs"][0] == pytest.approx(expected, abs=1e-4), answer.text
    whole = http.post(f"{url}/classify", json={"messages": said, "use_activation": False}).json()["data"][0]["probs"]
    cut = tokenizer.apply_chat_template(said, return_dict=False, continue_final_message=True)
    asked = {"messages": said, "continue_final_message": True, "use_activation": False}
    answer = http.post(f"{url}/classify", json=asked).json()["data"][0]["probs"]
    with torch.no_grad():
        assert answer[0] == pytest.approx(float(model(torch.tensor([cut])).logits), abs=1e-4) and answer != whole
    squashed = http.post(f"{url}/score", json={"queries": ASKED[0]["content"], "documents": "there are 12 apples."}).json()
    assert squashed["data"][0]["score"] == pytest.approx(1 / (1 + math.exp(-expected)), abs=1e-4)
    assert http.post(f"{url}/classify", json={"input": [0] * 513}).status_code == 422


def test_best_of_n_is_the_best_by_the_reward_model(served: tuple[str, Path]) -> None:
    url, _ = served
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    options = {"best_of_n": 8, "reward_model": "reward"}
    found = client.chat.completions.create(model="policy", messages=ASKED, n=8, max_tokens=12, extra_body=options)  # type: ignore[arg-type]
    rewards = [choice.reward for choice in found.choices]  # type: ignore[attr-defined]
    assert len(rewards) == 8 and rewards == sorted(rewards, reverse=True) and len(set(rewards)) > 1
    assert found.usage and 8 <= found.usage.completion_tokens <= 96
    pieces: Any = client.chat.completions.create(model="policy", messages=ASKED, max_tokens=12, stream=True, temperature=0)  # type: ignore[arg-type]
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    whole = client.chat.completions.create(model="policy", messages=ASKED, max_tokens=12, temperature=0)  # type: ignore[arg-type]
    assert streamed == whole.choices[0].message.content
    with pytest.raises(openai.UnprocessableEntityError, match="511"):
        client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "apples " * 600}])
    with pytest.raises(openai.UnprocessableEntityError, match="seed"):
        client.chat.completions.create(model="policy", messages=ASKED, seed=1)  # type: ignore[arg-type]


def test_the_judge_compares_probabilities(served: tuple[str, Path], policy: Path) -> None:
    found = http.post(
        f"{served[0]}/v1/judge", json={"messages": ASKED, "responses": ["12 apples", "no"], "template": "{first} {second}"}
    ).json()
    assert found["winner"] in (0, 1, "tie") and len(found["verdicts"]) == 2
    chat, model = Chat(str(policy)), AutoModelForCausalLM.from_pretrained(policy).eval()
    labels = labels_of(chat)
    shares = []
    for order in (["12 apples", "no"], ["no", "12 apples"]):
        question = prompts.fill("{first} {second}", ASKED, order, "logprob")
        with torch.no_grad():
            logits = model(torch.tensor([chat.prompt_ids([{"role": "user", "content": question}])])).logits[0, -1]
        shares.append(float(logits[labels].double().softmax(-1)[0]))
    told = [float(word.strip(";")) for word in re.findall(r"0\.\d+;?", found["explanation"])]
    assert told == pytest.approx([shares[0], 1 - shares[1]], abs=1e-3), found


def test_the_judge_answers_by_its_name_with_log_probs(served: tuple[str, Path], policy: Path) -> None:
    client = openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none")
    options: dict[str, Any] = {"model": "judge", "messages": ASKED, "max_tokens": 4}
    chat = Chat(str(policy))
    prompt = chat.prompt_ids(ASKED)
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    found = client.chat.completions.create(**options, temperature=0, logprobs=True, top_logprobs=5).choices[0]
    content = (found.logprobs and found.logprobs.content) or []
    said: list[int] = []
    with torch.no_grad():
        for _ in content:
            said.append(int(model(torch.tensor([prompt + said])).logits[0, -1].argmax()))
        logits = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits.double(), dim=-1)
    text = found.message.content or ""
    # Bytes that end no letter have no text of their own, and none at the end of all.
    whole = chat.tokenizer.decode(said, skip_special_tokens=True).replace("\ufffd", "")
    assert content and "".join(token.token for token in content) == text.replace("\ufffd", "") == whole
    for row, token, at in zip(expected, said, content, strict=True):
        assert at.logprob == pytest.approx(float(row[token]), abs=1e-3) and at.logprob == at.top_logprobs[0].logprob
        assert [other.logprob for other in at.top_logprobs] == pytest.approx(row.topk(5).values.tolist(), abs=1e-3)
    (plain,) = client.chat.completions.create(**options, temperature=0).choices
    assert plain.logprobs is None and plain.message.content == found.message.content
    # However it is drawn, a token's log-prob is the model's own; at the first place, as the others may be halves of letters.
    drawn = client.chat.completions.create(**options, temperature=1.7, top_p=0.5, logprobs=True, top_logprobs=5).choices[0]
    first = ((drawn.logprobs and drawn.logprobs.content) or [])[0]
    assert [other.logprob for other in first.top_logprobs] == pytest.approx(expected[0].topk(5).values.tolist(), abs=1e-3)
    assert float((expected[0] - first.logprob).abs().min()) < 1e-3


def test_a_tournament_is_judged_by_the_service(served: tuple[str, Path], policy: Path, tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "helpful.txt").write_text("{conversation} {first} or {second}")
    played = Played(tmp_path / "run")
    found = played.play(f"{served[0]}/v1", "judge", mode="logprob", templates=str(tmp_path / "templates"))
    assert found["games"] == 3 * ROWS and found["asking"]["failed"] == 0
    answers = pq.read_table(played.run.root / "evaluation" / "tournament" / "answers" / "00000.parquet").to_pylist()
    chat, model = Chat(str(policy)), AutoModelForCausalLM.from_pretrained(policy).eval()
    firsts = labels_of(chat)
    assert len(answers) == 2 * 3 * ROWS
    for row in answers:
        with torch.no_grad():
            logits = model(torch.tensor([chat.prompt_ids([{"role": "user", "content": row["question"]}])])).logits[0, -1]
        expected = torch.log_softmax(logits.double(), dim=-1)[firsts].tolist()
        assert row["logps"] == pytest.approx(expected, abs=1e-3), row


def test_a_stop_word_ends_a_response(served: tuple[str, Path]) -> None:
    body = {"prompt": "there are 12", "max_tokens": 40, "temperature": 0}
    whole = http.post(f"{served[0]}/v1/completions", json=body).json()["choices"][0]["text"]
    word = whole[len(whole) // 2 :][:3]
    cut = http.post(f"{served[0]}/v1/completions", json=body | {"stop": word, "reward_model": "reward"}).json()["choices"][0]
    assert cut["text"] == whole[: whole.index(word)] and cut["finish_reason"] == "stop" and isinstance(cut["reward"], float)


def test_the_rest_of_the_api_answers(served: tuple[str, Path]) -> None:
    url, _ = served
    assert {model["id"]: model["kind"] for model in http.get(f"{url}/v1/models").json()["data"]} == {
        "policy": "policy",
        "reward": "reward",
        "judge": "judge",
    }
    assert set(http.get(f"{url}/health").json().values()) == {"ready"}
    assert "gsil_requests_total" in http.get(f"{url}/metrics").text and "<title>" in http.get(url).text
    assert json.loads(http.get(f"{url}/openapi.json").text)["paths"]
    assert http.post(f"{url}/classify", content=b"x" * (5 * 2**20)).status_code == 413


def test_a_dead_engine_costs_a_retry_and_comes_back(served: tuple[str, Path]) -> None:
    url, reward = served
    (engine,) = replicas_of(reward.parents[1], ["policy"])["policy"]
    body = {"messages": ASKED, "max_tokens": 300, "best_of_n": 8, "temperature": 1.0}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=200) for _ in range(8)]
        time.sleep(0.5)
        os.kill(engine, signal.SIGKILL)
        answers = [answer.result() for answer in asked]
    assert {answer.status_code for answer in answers} <= {200, 503}, [answer.text for answer in answers]
    assert all("retry-after" in answer.headers and "error" in answer.json() for answer in answers if answer.status_code == 503)
    deadline = time.monotonic() + 120
    while http.get(f"{url}/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert replicas_of(reward.parents[1], ["policy"])["policy"] != [engine]
    assert http.post(f"{url}/v1/chat/completions", json=body | {"max_tokens": 4}).status_code == 200


def test_rays_own_command_serves_what_was_exported(tmp_path: Path) -> None:
    reward, config = reward_model(tmp_path / "reward", "llama"), tmp_path / "serve_config.yaml"
    (port,) = free_ports(1)
    sizes = {"server.port": port, "reward.max_model_len": 512, "reward.kv_cache_gib": 0.1, "reward.num_cpus": 1}
    flags = ["--reward.models", f"{{tiny: {reward}}}", *(part for key, value in sizes.items() for part in (f"--{key}", str(value)))]
    done = finish([sys.executable, "jobs/serve_bon.py", *flags, "--export", str(config)])
    assert done.returncode == 0 and "RayService" in done.stdout, done.stdout + done.stderr
    with listening(tmp_path, [str(Path(sys.executable).parent / "serve"), "run", "--address", "local", str(config)], port) as url:
        assert [model["id"] for model in http.get(f"{url}/v1/models").json()["data"]] == ["tiny"]
        assert math.isfinite(http.post(f"{url}/classify", json={"input": "a b"}).json()["data"][0]["probs"][0])
    wait_until_gone(tmp_path)
