"""The service on the real Ray Serve under faults and load, with models that only wait: dead processes, updates, more and fewer replicas."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from running import ROOT
from serving import replicas_of, service

pytestmark = pytest.mark.slow
FLAGS = ["--reward.models", "{reward: '1.5'}", "--policy.path", "stub", "--ray.num_cpus", "8"]
TWO = [part for pool in ("reward", "gateway") for end in ("min", "max") for part in (f"--{pool}.{end}_actors", "2")]
REWARD = ("/classify", {"input": "x", "use_activation": False})
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "best_of_n": 4})


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("faults")
    options = [*TWO, "--reward.num_cpus", "0.5"]
    with service(folder, *FLAGS, *options, module="tests/support/stub_serve.py") as found:
        yield found, folder


async def under_load(
    url: str, ask: tuple[str, Any], seconds: float, meanwhile: Callable[[], None], concurrency: int = 16
) -> list[httpx.Response]:
    """Answers to requests that come all the time; every one of them is answered."""
    answers: list[httpx.Response] = []
    asked = 0
    ends = time.monotonic() + seconds
    async with httpx.AsyncClient(timeout=60) as http:

        async def worker() -> None:
            nonlocal asked
            while time.monotonic() < ends:
                asked += 1
                answers.append(await http.post(url + ask[0], json=ask[1]))

        async def disturb() -> None:
            await asyncio.sleep(seconds / 4)
            await asyncio.to_thread(meanwhile)

        await asyncio.gather(disturb(), *(worker() for _ in range(concurrency)))
    assert len(answers) == asked
    return answers


@pytest.mark.parametrize(("name", "ask"), [("reward-reward", REWARD), ("policy", CHAT), ("gateway", REWARD)])
def test_a_killed_process_costs_503s_at_most_and_comes_back(url: tuple[str, Path], name: str, ask: tuple[str, Any]) -> None:
    address, folder = url
    before = replicas_of(folder, [name])[name]
    assert before, "no such process"
    answers = asyncio.run(under_load(address, ask, 12, lambda: os.kill(before[0], signal.SIGKILL)))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 503} and statuses[200] > 50, statuses
    if name != "gateway":
        assert statuses[503] == 0, "the gateway asks another process"
    assert all("retry-after" in answer.headers and "error" in answer.json() for answer in answers if answer.status_code == 503)
    deadline = time.monotonic() + 60
    while len(replicas_of(folder, [name])[name]) < len(before) or httpx.get(f"{address}/health").status_code != 200:
        assert time.monotonic() < deadline, replicas_of(folder, [name])
        time.sleep(0.5)
    assert before[0] not in replicas_of(folder, [name])[name]
    assert {answer.status_code for answer in asyncio.run(under_load(address, ask, 2, lambda: None))} == {200}


def test_an_update_under_load_fails_nobody(url: tuple[str, Path]) -> None:
    address, folder = url
    port = address.rpartition(":")[2]

    def update() -> None:
        cluster = (folder / f"service-{port}.log").read_text().partition("cluster: ")[2].split()[0]
        flags = [
            *FLAGS[:1],
            "{reward: '2.5'}",
            *FLAGS[2:],
            *TWO,
            "--reward.num_cpus",
            "0.5",
            "--ray.address",
            cluster,
            "--server.port",
            port,
        ]
        environment = os.environ | {"GSIL_TEST": str(folder), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
        environment = {name: value for name, value in environment.items() if not name.startswith("RAY_")} | {"RAY_AUTH_MODE": "token"}
        done = subprocess.run(
            [sys.executable, "tests/support/stub_serve.py", *flags], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    answers = asyncio.run(under_load(address, REWARD, 40, update))
    assert Counter(answer.status_code for answer in answers).keys() == {200}
    values = [answer.json()["data"][0]["probs"][0] for answer in answers]
    assert values[0] == 1.5 and values[-1] == 2.5 and set(values) == {1.5, 2.5}


def test_a_full_queue_is_told_at_once_and_the_accepted_are_served(tmp_path: Path) -> None:
    options = ["--reward.max_ongoing_requests", "2", "--reward.max_queued_requests", "4"]
    with service(tmp_path, *FLAGS, *options, module="tests/support/stub_serve.py") as address:

        async def work() -> list[tuple[int, float, str | None]]:
            async with httpx.AsyncClient(timeout=30) as http:

                async def one() -> tuple[int, float, str | None]:
                    started = time.monotonic()
                    answer = await http.post(address + REWARD[0], json=REWARD[1])
                    return answer.status_code, time.monotonic() - started, answer.headers.get("retry-after")

                return await asyncio.gather(*(one() for _ in range(64)))

        found = asyncio.run(work())
    statuses = Counter(status for status, _, _ in found)
    assert set(statuses) == {200, 503} and statuses[200] >= 6, statuses
    assert all(after is not None for status, _, after in found if status == 503)
    refused = sorted(seconds for status, seconds, _ in found if status == 503)
    assert refused[len(refused) // 2] < min(seconds for status, seconds, _ in found if status == 200) + 0.5, "nobody waits for a refusal"


def test_a_client_that_goes_away_frees_its_place(tmp_path: Path) -> None:
    options = ["--policy.max_ongoing_requests", "1"]
    with service(tmp_path, *FLAGS, *options, module="tests/support/stub_serve.py") as address:
        for how in ({}, {"best_of_n": 4}, {"stream": True}, {"stream": True, "best_of_n": 4}):
            with pytest.raises(httpx.ReadTimeout):
                _ask(address, "slow", how, seconds=1.5)
            started = time.monotonic()
            assert "words" in _ask(address, "quick", {"stream": True}, seconds=20)
            assert time.monotonic() - started < 10, f"{how}: the policy still works for a client that is gone"


def _ask(address: str, words: str, how: dict[str, Any], seconds: float) -> str:
    body = {"messages": [{"role": "user", "content": words}]} | how
    with httpx.stream("POST", address + "/v1/chat/completions", json=body, timeout=seconds) as answer:
        assert answer.status_code == 200
        return "".join(answer.iter_text())


def test_replicas_follow_the_load(tmp_path: Path) -> None:
    options = ["--reward.max_actors", "3", "--reward.num_cpus", "0.5", "--reward.target_ongoing_requests", "2"]
    options += ["--reward.upscale_delay", "1", "--reward.downscale_delay", "3"]
    with service(tmp_path, *FLAGS, *options, module="tests/support/stub_serve.py") as address:
        most = 0

        def watch() -> None:
            nonlocal most
            deadline = time.monotonic() + 18
            while time.monotonic() < deadline and most < 3:
                most = max(most, len(replicas_of(tmp_path, ["reward-reward"])["reward-reward"]))
                time.sleep(0.3)

        answers = asyncio.run(under_load(address, REWARD, 25, watch, concurrency=24))
        assert most == 3 and {answer.status_code for answer in answers} == {200}
        deadline = time.monotonic() + 60
        while len(replicas_of(tmp_path, ["reward-reward"])["reward-reward"]) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_a_service_that_ends_answers_what_is_under_way_and_takes_no_more(tmp_path: Path) -> None:
    with service(tmp_path, *FLAGS, module="tests/support/stub_serve.py") as address, ThreadPoolExecutor(1) as pool:
        body = {"messages": [{"role": "user", "content": "patient"}], "best_of_n": 4}
        asked = pool.submit(httpx.post, address + CHAT[0], json=body, timeout=60)
        time.sleep(2)
        port = address.rpartition(":")[2]
        (process,) = (
            found for found in psutil.process_iter(["cmdline"]) if {"tests/support/stub_serve.py", port} <= set(found.info["cmdline"] or ())
        )
        process.terminate()
        time.sleep(2)
        refused = httpx.post(address + REWARD[0], json=REWARD[1])
        assert refused.status_code == 503 and refused.json()["error"]["message"] == "this service ends" and "retry-after" in refused.headers
        answer = asked.result()
        # The reward model, which had nothing to do all the time, is still there.
        assert answer.status_code == 200 and answer.json()["choices"][0]["reward"] == 1.5, answer.text
        process.wait(40)
