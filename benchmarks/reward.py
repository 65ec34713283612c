"""Our batch scorer and a bare vLLM pooling engine on the same responses with the same reward model.

    python benchmarks/reward.py [--prompts 32] [--responses 2 16] [--response-tokens 40] [--precision bfloat16 float32] [--rounds 3]

A random reward head on SmolLM2-135M; the prompts and responses are those of the GSM8K pairs (or words of such lengths, see train_step.py):
of R responses to a prompt the first two are its own, the others those of the next rows. Each system is a fresh process that loads, scores
a few responses to warm up, then all of them `rounds` times, every time with an empty prefix cache; the median counts. vLLM gets the ids of
every conversation in one call of `classify`; ours is measured in vLLM and in transformers (`scoring.backend`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train_step import cpu_name, matmul_peak, prepare_model, read_pairs


def main() -> None:
    """Prepares model and responses, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--responses", type=int, nargs="+", default=[2, 16], help="to each prompt")
    parser.add_argument("--precision", nargs="+", default=["bfloat16", "float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--max-batch-tokens", type=int, default=2048, help="ours: tokens at once")
    parser.add_argument("--response-tokens", type=int, help="responses are cut to so many; as they are by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        job = json.loads(options.child)
        print("RESULT " + json.dumps((bare_vllm if job["who"] == "bare vLLM" else ours)(job, json.loads(Path(job["data"]).read_text()))))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        reward = reward_model(prepare_model(work), work / "reward")
        peaks = ", ".join(f"{p} {matmul_peak(p, options.threads):.0f} GFLOP/s" for p in options.precision)
        print(f"{options.threads} threads of {cpu_name()}; matmul peak {peaks}")
        for count in options.responses:
            rows = with_responses(read_pairs(work, options.prompts), count, options.response_tokens)
            (work / "rows.json").write_text(json.dumps(rows))
            for precision in options.precision:
                measure(options, reward, work / "rows.json", rows, precision)


def measure(options: Any, reward: Path, data: Path, rows: list[dict[str, Any]], precision: str) -> None:
    """One line of the table for each system, and their ratio."""
    responses = sum(len(row["responses"]) for row in rows)
    tokens = sum(len(row["prompt_ids"]) + len(ids) for row in rows for ids in row["responses"])
    print(f"\n{precision}, {len(rows)} prompts x {responses // len(rows)} responses, mean {tokens / responses:.0f} tokens with the prompt")
    found = {}
    for who in ("bare vLLM", "ours, vllm", "ours, transformers"):
        job = {"who": who, "model": str(reward), "data": str(data), "precision": precision, "threads": options.threads}
        job |= {"rounds": options.rounds, "backend": who.removeprefix("ours, "), "max_batch_tokens": options.max_batch_tokens}
        found[who] = run_child(job)
        each = responses / found[who]["seconds"]
        print(f"  {who:18} {found[who]['seconds']:6.1f} s  {each:6.1f} responses/s  (rounds {found[who]['rounds']})", flush=True)
    bare = found.pop("bare vLLM")
    for who, run in found.items():
        apart = max(abs(a - b) for a, b in zip(run["rewards"], bare["rewards"], strict=True))
        print(f"  {who} to bare vLLM: {bare['seconds'] / run['seconds']:.2f} x; rewards differ by {apart:.3f} at most", flush=True)


def run_child(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one system in a process of its own, with the environment that its actors have in a job."""
    from actors.generator import environment
    from actors.settings import RewardScoring

    own = environment(RewardScoring(num_cpus=job["threads"])) | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(done.stdout + done.stderr)
    return json.loads(lines[-1].removeprefix("RESULT "))


def timed(score: Any, job: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Warms up, then scores everything several times."""
    score(rows[:2])
    rounds = []
    rewards: list[float] = []
    for _ in range(job["rounds"]):
        started = time.monotonic()
        rewards = score(rows)
        rounds.append(round(time.monotonic() - started, 2))
    return {"seconds": statistics.median(rounds), "rounds": rounds, "rewards": rewards}


def ours(job: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The model of `pipelines/scorers.py`."""
    from actors.learner.batches import Example
    from actors.reward import engine as reward_engine
    from actors.settings import RewardScoring

    scoring = RewardScoring(num_cpus=job["threads"], max_batch_tokens=job["max_batch_tokens"], backend=job["backend"])
    scorer, _ = reward_engine.load(job["model"], scoring, job["precision"], 2048)

    def score(some: list[dict[str, Any]]) -> list[float]:
        examples = [Example(str(k), row["prompt_ids"], tuple(row["responses"])) for k, row in enumerate(some)]
        return [value for values in scorer(examples) for value in values]

    return timed(score, job, rows)


def bare_vllm(job: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """vLLM's pooling runner as its documentation shows it."""
    from vllm import LLM, PoolingParams

    llm = LLM(job["model"], runner="pooling", convert="classify", dtype=job["precision"], max_model_len=2048, enforce_eager=True)
    raw = PoolingParams(use_activation=False)

    def score(some: list[dict[str, Any]]) -> list[float]:
        llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": [*row["prompt_ids"], *ids]} for row in some for ids in row["responses"]]
        return [output.outputs.probs[0] for output in llm.classify(prompts, pooling_params=raw, use_tqdm=False)]

    return timed(score, job, rows)


def with_responses(rows: list[dict[str, Any]], count: int, tokens: int | None) -> list[dict[str, Any]]:
    """`count` responses to each prompt, of so many tokens at most: its own two, then those of the next rows."""
    both = [ids[:tokens] for row in rows for ids in (row["real_ids"], row["generated_ids"])]
    return [
        {"prompt_ids": row["prompt_ids"], "responses": [both[(2 * k + r) % len(both)] for r in range(count)]} for k, row in enumerate(rows)
    ]


def reward_model(policy: Path, directory: Path) -> Path:
    """A reward model with a random head."""
    import torch
    from transformers import AutoTokenizer

    from actors.learner.policy import load

    torch.manual_seed(0)
    model = load(str(policy), "float32", None, False, "reward")
    torch.nn.init.normal_(model.score.weight, std=0.05)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(policy).save_pretrained(directory)
    return directory


if __name__ == "__main__":
    main()
