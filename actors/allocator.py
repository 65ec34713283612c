"""The environment of a process that computes, and what it does with freed memory on a CPU.

By default it gives blocks back to the system, and every step faults activations, gradients and logits in again, page by page. In huge
pages, and with freed blocks kept, that time is gone; how much is kept is weighed against memory. Measured on 2 cores (AMD EPYC) with
SmolLM2-135M:

    generation, vLLM, bfloat16, 256 samples      glibc's default 471 to 515 tokens/s, tcmalloc 614, GENERATION 714
    training, bfloat16, 12 pairs of GSM8K        huge pages alone 25.4 s at 4.1 GiB, BFLOAT16 22.1 s at 4.15, all kept 22.4 s at 4.8
    training, float32, 12 pairs of GSM8K         BFLOAT16's numbers 45 s at 3.9 GiB, FLOAT32 41 s at 4.1
"""

import contextlib
import ctypes

MIB = 2**20


def keeping(block_mib: int, total_mib: int) -> dict[str, str]:
    """Environment variables, to be set before a process starts.

    Args:
        block_mib: the largest block that is kept when it is freed.
        total_mib: how much of free memory at the top of the heap is kept in all.
    """
    thresholds = {"MALLOC_MMAP_THRESHOLD_": str(block_mib * MIB), "MALLOC_TRIM_THRESHOLD_": str(total_mib * MIB)}
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | thresholds


def trim() -> None:
    """Gives all that is free back to the system: who waits needs none of it."""
    # Other C libraries than glibc have no such call.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


GENERATION = keeping(512, 32 * 1024)
# Rows of every length are matrices of another shape, and oneDNN keeps the code that it makes for each: 1,024 of them by default, which was
# half a GiB of 4.5 after 8 steps (SmolLM2-135M, bfloat16) and brought no time.
FEW_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
TRAINING = {"bfloat16": keeping(32, 256) | FEW_PRODUCTS, "float32": keeping(128, 32 * 1024) | FEW_PRODUCTS}
"""By precision; for scoring too."""


def environment(precision: str, cpus: float, gpus: float) -> dict[str, str]:
    """Environment variables of a process that trains or scores, to be set before it starts.

    Args:
        precision: of the forward pass.
        cpus: that it has.
        gpus: that it has.
    """
    values = TRAINING[precision] | {"OMP_NUM_THREADS": str(max(1, int(cpus))), "TOKENIZERS_PARALLELISM": "false"}
    # Ray hides no GPU from a worker that asked for none, and DeepSpeed takes what it sees.
    return values if gpus else values | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
