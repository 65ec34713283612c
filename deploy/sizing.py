"""How large a cluster has to be, and how long the published run takes on it: arithmetic with every assumption named.

    python deploy/sizing.py            the table of deploy/README.md
    python deploy/sizing.py --gpu B200 --gpus 16 --model 70B

The run is GSIL's (jobs/configs/zephyr_7b_ultrafeedback.yaml): 62,000 prompts, three iterations, no SFT before them, bfloat16.
A FLOP count is 2 for every weight and token forward, twice that backward, and one more forward where activations are recomputed.
"""

import argparse
from dataclasses import dataclass

GIB = 2**30

# The run.
PROMPTS, HELD_OUT, PAIRS_HELD_OUT, ITERATIONS = 62_000, 2_000, 512, 3
# Means over 905 rows of UltraFeedback with prompts of at most 512 tokens, in tokens of SmolLM2; a sample is cut at 256 tokens.
PROMPT_TOKENS, DEMONSTRATION_TOKENS, SAMPLE_TOKENS = 133, 291, 169
LONGEST_PROMPT, LONGEST_SAMPLE = 512, 256
MICRO_BATCH_TOKENS = 8192
"""that a worker trains on at once"""
MAX_NUM_SEQS = 256
"""that an engine decodes at once"""

# Assumptions on how well hardware is used. Measure yours: `tokens_per_second` in metrics.jsonl, the times of summary.json.
MFU = 0.35
"""share of a GPU's bfloat16 peak that training, scoring and the reading of prompts reach"""
DECODING = 0.4
"""share of the memory bandwidth that the decoding of samples reaches"""
STEP_SECONDS = 0.005
"""of scheduling and sampling, every step of an engine"""
USABLE = 0.9
"""share of a GPU's memory that may be filled"""
RESERVED = 4 * GIB
"""of CUDA, NCCL and buckets, on every GPU"""
STAGE_MINUTES = 3.0
"""in which processes start and weights are read, for every stage"""
GPUS_A_NODE = 8


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama 3 model."""

    parameters: float
    layers: int
    width: int
    kv_width: int
    """key-value heads times their width"""

    def kv_bytes(self) -> int:
        """Of the key-value cache, a token, in bfloat16."""
        return 2 * 2 * self.layers * self.kv_width

    def state_bytes(self, zero_stage: int, gpus: int) -> float:
        """Of weights, gradients and AdamW's state on one GPU: weights in bfloat16, master weights and both moments in float32.
        At ZeRO 1 this project sums gradients in float32, at 2 and 3 in bfloat16."""
        kept, shared = {1: (2 + 4, 12), 2: (2, 2 + 12), 3: (0, 2 + 2 + 12)}[zero_stage]
        return self.parameters * (kept + shared / gpus)

    def activation_bytes(self) -> float:
        """Of one micro-batch with recomputation: every layer's input, and all of one layer (34 bytes a token and width, without the
        attention matrix: arXiv 2205.05198)."""
        return MICRO_BATCH_TOKENS * self.width * (2 * self.layers + 34)


@dataclass(frozen=True)
class Gpu:
    """Peaks by the data sheet; dense bfloat16."""

    memory: float
    flops: float
    bandwidth: float


MODELS = {"1B": Model(1.24e9, 16, 2048, 512), "8B": Model(8.03e9, 32, 4096, 1024), "70B": Model(70.6e9, 80, 8192, 1024)}
GPUS = {
    "A100": Gpu(80e9, 312e12, 2.04e12),
    "H100": Gpu(80e9, 989e12, 3.35e12),
    "H200": Gpu(141e9, 989e12, 4.8e12),
    "B200": Gpu(180e9, 2250e12, 7.7e12),
}
TABLE = [
    ("1B", "A100", 1),
    ("1B", "A100", 8),
    ("8B", "A100", 8),
    ("8B", "H100", 8),
    ("8B", "H100", 16),
    ("70B", "H100", 32),
    ("70B", "B200", 16),
]


@dataclass(frozen=True)
class Size:
    """What one row of the table says. Times are hours, memory is GiB."""

    zero_stage: int | None
    """the lowest that fits; None where none does"""
    training_gib: float
    host_gib: float
    """on a node, while every worker reads all weights"""
    tensor_parallel: int
    decoded: float
    """tokens a second and GPU"""
    scoring_gib: float
    """the reference is scored with on one GPU"""
    scoring_fits: bool
    disk_gib: float
    generation: float
    scoring: float
    training: float

    @property
    def total(self) -> float:
        """With the starts of the stages."""
        stages = 1 + 3 * ITERATIONS + 1
        return self.generation + self.scoring + self.training + stages * STAGE_MINUTES / 60


def size(model: Model, gpu: Gpu, gpus: int) -> Size:
    """Sizes the run.

    Args:
        model: that is aligned.
        gpu: of every node.
        gpus: in all.
    """
    room = USABLE * gpu.memory - RESERVED
    needs = {stage: model.state_bytes(stage, gpus) + model.activation_bytes() for stage in (1, 2, 3)}
    zero = next((stage for stage, need in needs.items() if need <= room), None)
    tensor_parallel = _tensor_parallel(model, gpu)
    decoded = decoding(model, gpu, tensor_parallel)
    weights = 2 * model.parameters
    forward = weights / (gpu.flops * MFU * gpus)
    sampled = ITERATIONS * (PROMPTS + PAIRS_HELD_OUT) + (ITERATIONS + 2) * HELD_OUT
    scored = ITERATIONS * (PROMPTS + PAIRS_HELD_OUT) * (PROMPT_TOKENS + DEMONSTRATION_TOKENS + SAMPLE_TOKENS)
    trained = ITERATIONS * PROMPTS * (PROMPT_TOKENS + DEMONSTRATION_TOKENS + SAMPLE_TOKENS)
    return Size(
        zero_stage=zero,
        training_gib=(needs[zero or 3] + RESERVED) / GIB,
        host_gib=min(gpus, GPUS_A_NODE) * weights / GIB,
        tensor_parallel=tensor_parallel,
        decoded=decoded,
        scoring_gib=(weights + RESERVED) / GIB,
        scoring_fits=weights <= room,
        # The base model, a policy of each iteration and the final one in bfloat16, and one checkpoint of the training state.
        disk_gib=((ITERATIONS + 2) * weights + 14 * model.parameters) / GIB,
        generation=(sampled * SAMPLE_TOKENS / (decoded * gpus) + sampled * PROMPT_TOKENS * forward) / 3600,
        scoring=scored * forward / 3600,
        training=trained * 4 * forward / 3600,
    )


def _tensor_parallel(model: Model, gpu: Gpu) -> int:
    """The fewest GPUs that hold the weights and the key-value cache of 64 of the longest sequences."""
    need = 2 * model.parameters + 64 * (LONGEST_PROMPT + LONGEST_SAMPLE) * model.kv_bytes()
    gpus = 1
    while need > gpus * (USABLE * gpu.memory - RESERVED):
        gpus *= 2
    return gpus


def decoding(model: Model, gpu: Gpu, tensor_parallel: int) -> float:
    """Tokens a second and GPU: a step reads all weights and the key-value cache of every sequence once."""
    context = PROMPT_TOKENS + SAMPLE_TOKENS / 2
    room = tensor_parallel * (USABLE * gpu.memory - RESERVED) - 2 * model.parameters
    sequences = min(MAX_NUM_SEQS, room / ((PROMPT_TOKENS + SAMPLE_TOKENS) * model.kv_bytes()))
    read = (2 * model.parameters + sequences * context * model.kv_bytes()) / (gpu.bandwidth * DECODING)
    computed = 2 * model.parameters * sequences / (gpu.flops * MFU)
    # Both for the GPUs of an engine together, of which each does its share.
    return sequences / (max(read, computed) + STEP_SECONDS * tensor_parallel)


HEAD = (
    *(
        "model",
        "GPUs",
        "ZeRO",
        "training, GiB a GPU",
        "loading, host GiB a node",
        "tensor parallel",
        "tokens/s a GPU",
        "scoring on one GPU",
    ),
    *("disk, GiB", "generation, h", "scoring, h", "training, h", "all, h"),
)


def row(name: str, gpu: str, gpus: int) -> list[str]:
    """One row of the table, as text."""
    found = size(MODELS[name], GPUS[gpu], gpus)
    fits = f"{'fits' if found.scoring_fits else '**does not fit**'}: {found.scoring_gib:.0f} GiB"
    zero = str(found.zero_stage) if found.zero_stage else "**none fits**"
    sizes = [f"{found.training_gib:.0f}", f"{found.host_gib:.0f}", str(found.tensor_parallel), f"{found.decoded:,.0f}", fits]
    hours = [f"{value:.1f}" for value in (found.generation, found.scoring, found.training, found.total)]
    return [name, f"{gpus} x {gpu}", zero, *sizes, f"{found.disk_gib:.0f}", *hours]


def table(rows: list[tuple[str, str, int]]) -> str:
    """In Markdown."""
    lines = [HEAD, ("---",) * len(HEAD), *(row(*asked) for asked in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Prints the table, or the row that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="8B")
    parser.add_argument("--gpu", choices=GPUS, default="A100")
    parser.add_argument("--gpus", type=int, help="one row for so many GPUs; else the whole table")
    asked = parser.parse_args()
    print(table([(asked.model, asked.gpu, asked.gpus)] if asked.gpus else TABLE))


if __name__ == "__main__":
    main()
