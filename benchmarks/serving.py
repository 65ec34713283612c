"""Our served reward model, vLLM's own server and the usual FastAPI + transformers server, on the same responses over HTTP.

    python benchmarks/serving.py [--responses 256] [--concurrency 1 8 32] [--only ours stub ...] [--rounds 10]

A random reward head on SmolLM2-135M in bfloat16 (the FastAPI server also in float32, which it takes where the weights are stored so); each
request asks for the reward of one text, the prompt and a response of the GSM8K pairs (or words of such lengths, see train_step.py). Every
server is started afresh, warmed up with a few requests and asked for all texts at every concurrency. `stub` is our service with a model
that costs nothing, `Ray Serve` a gateway and a model on it that do nothing at all: their difference is what our gateway adds. `best of N`
is a chat completion of 64 new tokens of the same service with a policy, N = 1 and N = 16 one after the other, --rounds times; of both the
median of the seconds, their spread, and the tokens that came. --reward.backend is that of our reward models.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from reward import reward_model
from train_step import cpu_name, matmul_peak, prepare_model, read_pairs

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = ("ours", "vllm serve", "FastAPI bfloat16", "FastAPI float32", "stub", "Ray Serve", "best of N")


def main() -> None:
    """Prepares model and texts, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=256)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--reward.backend", dest="backend", choices=["auto", "vllm", "transformers"], default="auto")
    parser.add_argument("--fastapi", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--stub", help=argparse.SUPPRESS)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fastapi:
        fastapi_server(options.fastapi[0], options.fastapi[1], int(options.fastapi[2]))
    elif options.stub:
        stub_server(int(options.stub))
    elif options.bare:
        bare_server(int(options.bare))
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(options, Path(folder))


def measure(options: Any, work: Path) -> None:
    """The tables."""
    policy = prepare_model(work)
    reward = reward_model(policy, work / "reward")
    words = texts(work, policy, options.responses)
    tokens = statistics.mean(count for _, count in words)
    peak = matmul_peak("bfloat16", options.threads)
    print(
        f"{options.threads} threads of {cpu_name()}; matmul peak bfloat16 {peak:.0f} GFLOP/s; {len(words)} texts, mean {tokens:.0f} tokens"
    )
    rates: dict[tuple[str, int], float] = {}
    for system in options.only:
        if system == "best of N":
            continue
        with served(system, reward, policy, options) as url:
            for concurrency in options.concurrency:
                body, path = ("query", "/get_reward") if system.startswith("FastAPI") else ("input", "/classify")
                asked = [{body: [text]} for text, _ in words]
                seconds, latencies = asyncio.run(ask(url + path, asked, concurrency))
                rates[system, concurrency] = len(asked) / seconds
                p50, p95, p99 = (1000 * quantile(latencies, q) for q in (0.5, 0.95, 0.99))
                print(
                    f"  {system:16} concurrency {concurrency:2}: {len(asked) / seconds:7.1f} requests/s"
                    f"   p50 {p50:8.1f} ms   p95 {p95:8.1f} ms   p99 {p99:8.1f} ms",
                    flush=True,
                )
    for other in SYSTEMS[1:4]:
        for concurrency in options.concurrency:
            if ("ours", concurrency) in rates and (other, concurrency) in rates:
                print(f"  ours to {other}, concurrency {concurrency}: {rates['ours', concurrency] / rates[other, concurrency]:.2f} x")
    if "best of N" in options.only:
        best_of_n(options, reward, policy)


def best_of_n(options: Any, reward: Path, policy: Path) -> None:
    """Seconds of one completion of 64 tokens, for N = 1 and N = 16."""
    question = "How many legs have three cats and two birds? Explain at length."
    asked = {"messages": [{"role": "user", "content": question}], "max_tokens": 64, "reward_model": "reward"}
    seconds: dict[int, list[float]] = {1: [], 16: []}
    tokens: dict[int, list[int]] = {1: [], 16: []}
    with served("best of N", reward, policy, options) as url, httpx.Client(timeout=600) as http:
        # Turn about: what else the machine does falls on both alike. The first rounds warm up.
        for number in range(-2, options.rounds):
            for n in seconds:
                started = time.monotonic()
                answer = http.post(f"{url}/v1/chat/completions", json=asked | {"best_of_n": n})
                took = time.monotonic() - started
                answer.raise_for_status()
                if number >= 0:
                    seconds[n].append(took)
                    tokens[n].append(answer.json()["usage"]["completion_tokens"])
    for n, found in seconds.items():
        print(
            f"  best of N: N = {n:2}: median {statistics.median(found):.2f} s ({min(found):.2f} to {max(found):.2f}), "
            f"{statistics.median(tokens[n]):g} tokens, {sum(tokens[n]) / sum(found):.0f} tokens/s",
            flush=True,
        )
    ratios = [many / one for one, many in zip(*seconds.values(), strict=True)]
    print(f"  best of N: N = 16 to N = 1: {statistics.median(ratios):.2f} x (rounds: {', '.join(f'{r:.2f}' for r in ratios)})", flush=True)


async def ask(url: str, bodies: list[Any], concurrency: int) -> tuple[float, list[float]]:
    """Sends all requests, so many at once; returns the seconds of all and of each."""
    latencies = []
    waiting = list(reversed(bodies))
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=concurrency)) as http:
        for body in bodies[:2]:
            (await http.post(url, json=body)).raise_for_status()

        async def worker() -> None:
            while waiting:
                body = waiting.pop()
                started = time.monotonic()
                answer = await http.post(url, json=body)
                answer.raise_for_status()
                latencies.append(time.monotonic() - started)

        started = time.monotonic()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return time.monotonic() - started, latencies


@contextlib.contextmanager
def served(system: str, reward: Path, policy: Path, options: Any) -> Iterator[str]:
    """A server, and its URL."""
    threads = options.threads
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    python = sys.executable
    ours = [python, "jobs/serve_bon.py", "--server.port", str(port), "--reward.precision", "bfloat16"]
    ours += ["--ray.num_cpus", str(2 * threads + 1)]
    ours += ["--reward.backend", options.backend]
    ours += [f"--reward.models={{reward: {reward}}}", "--reward.num_cpus", str(threads), "--reward.kv_cache_gib", "0.5"]
    flags = {
        "model": str(reward),
        "runner": "pooling",
        "convert": "classify",
        "port": str(port),
        "dtype": "bfloat16",
        "max-model-len": "2048",
        "served-model-name": "reward",
    }
    vllm = [part for key, value in flags.items() for part in (f"--{key}", value)]
    policy_flags = ["--policy.path", str(policy), "--policy.num_cpus", str(threads), "--policy.dtype", "bfloat16"]
    command = {
        "ours": [*ours, "--policy.path", "none"],
        "best of N": [*ours, *policy_flags, "--policy.kv_cache_gib", "0.5"],
        "stub": [python, __file__, "--stub", str(port)],
        "Ray Serve": [python, __file__, "--bare", str(port)],
        **{
            f"FastAPI {precision}": [python, __file__, "--fastapi", str(reward), precision, str(port)]
            for precision in ("bfloat16", "float32")
        },
        # The module behind `vllm serve`: the command itself looks for a package of the name vllm, and the CPU build has another.
        "vllm serve": [
            *(python, "-m", "vllm.entrypoints.openai.api_server", *vllm),
            *("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
        ],
    }[system]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 300
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(f"{system} does not start:\n{log.read()[-3000:]}")
                time.sleep(0.5)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def texts(work: Path, policy: Path, count: int) -> list[tuple[str, int]]:
    """Conversations as text, each with its number of tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    rows = read_pairs(work, max(1, count // 2))
    every = [[*row["prompt_ids"], *ids] for row in rows for ids in (row["real_ids"], row["generated_ids"])]
    found = [(tokenizer.decode(every[number % len(every)]), len(every[number % len(every)])) for number in range(count)]
    random.Random(0).shuffle(found)
    return found


def fastapi_server(reward: str, precision: str, port: int) -> None:
    """The pattern of most reward servers: a handler that blocks while transformers scores a request's texts, padded on the left."""
    import torch
    import uvicorn
    from fastapi import FastAPI, Request
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(reward, dtype=getattr(torch, precision)).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward, padding_side="left")
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    @app.post("/get_reward")
    async def get_reward(request: Request) -> dict[str, Any]:
        queries = (await request.json())["query"]
        batch = tokenizer(queries, return_tensors="pt", padding=True, truncation=True, max_length=2048)
        with torch.no_grad():
            return {"rewards": model(**batch).logits.float().flatten().tolist()}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def stub_server(port: int) -> None:
    """Our service with a reward model that costs nothing."""
    from pipelines.serving import application, models, start
    from pipelines.serving.prompts import About
    from pipelines.serving.rewards import Rewards
    from pipelines.serving.settings import RewardService, Server, ServiceConfig
    from pipelines.settings import RaySettings
    from pipelines.workers import cluster

    class Stub:
        def __init__(self, *_: Any):
            pass

        async def about(self) -> About:
            return About("reward", 2048, "stub")

        async def rewards(self, items: Any) -> Rewards:
            return Rewards([0.0] * len(items), [1] * len(items))

    application.RewardReplica = Stub  # type: ignore[misc, assignment]
    application.checked_weights = lambda path, server: path
    config = ServiceConfig(server=Server(port=port), reward=RewardService(models={"reward": "stub"}))
    os.environ |= models.environment(config)
    with cluster.connected(RaySettings(num_cpus=4)):
        start.start(config, told=lambda states: None)
        while True:
            time.sleep(1)


def bare_server(port: int) -> None:
    """What Ray Serve and FastAPI cost alone."""
    from fastapi import FastAPI, Request
    from ray import serve
    from ray.serve.config import HTTPOptions

    from pipelines.settings import RaySettings
    from pipelines.workers import cluster

    app = FastAPI()

    @serve.deployment(max_ongoing_requests=256)
    class Model:
        async def rewards(self, texts: list[str]) -> list[float]:
            return [0.0] * len(texts)

    @serve.deployment(max_ongoing_requests=1024)
    @serve.ingress(app)
    class Gateway:
        def __init__(self, model: Any):
            self.model = model

        @app.get("/health")
        async def health(self) -> dict[str, str]:
            return {}

        @app.post("/classify")
        async def classify(self, request: Request) -> Any:
            return await self.model.rewards.remote((await request.json())["input"])

    with cluster.connected(RaySettings(num_cpus=4)):
        serve.start(http_options=HTTPOptions(port=port))
        serve.run(Gateway.bind(Model.bind()))  # type: ignore[attr-defined]
        while True:
            time.sleep(1)


def quantile(values: list[float], share: float) -> float:
    """Of measured values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    main()
