"""What the best of n samples is worth, for every n, from one set of N samples: exact expectations instead of new sampling.

Pure functions of numpy arrays. Shapes: N samples of a prompt, P prompts, M reward models, S sizes n.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def chosen_with_probability(scores_N: Array, sizes: Sequence[int]) -> Array:
    """How likely each sample is the one of the highest score among n samples drawn without replacement from all N.

    The sample of rank i (1: lowest) is the best of a subset of n when the other n - 1 rank below it: C(i - 1, n - 1) / C(N, n). Samples
    of equal score share what they have together: between them the choice is random.

    Args:
        scores_N: by which the best is chosen.
        sizes: the n, each from 1 to N.

    Returns:
        `[S, N]`, rows add up to 1. Its product with any value of the samples is that value's exact expectation for the best of n.

    Raises:
        ValueError: an n is below 1 or above N, or a score is not finite.
    """
    total = len(scores_N)
    if any(not 1 <= n <= total for n in sizes):
        raise ValueError(f"best of n needs 1 <= n <= {total}, not {', '.join(str(n) for n in sizes)}")
    if not np.isfinite(scores_N).all():
        raise ValueError("a score is not finite")
    order = np.argsort(scores_N, kind="stable")
    _, first, group_N = np.unique(scores_N[order], return_index=True, return_inverse=True)
    counts = np.diff([*first, total])
    found = np.empty((len(sizes), total))
    for s, n in enumerate(sizes):
        shared = np.add.reduceat(_by_rank(n, total), first) / counts
        found[s, order] = shared[group_N]
    return found


@functools.cache
def _by_rank(n: int, total: int) -> Array:
    """C(rank - 1, n - 1) / C(total, n) for every rank, `[N]`."""
    subsets = math.comb(total, n)
    return np.array([math.comb(rank - 1, n - 1) / subsets for rank in range(1, total + 1)])


def kl_to_policy(n: int) -> float:
    """KL divergence of the best of n from the policy that drew the samples, in nats: log n - (n - 1) / n (AfD, arXiv 2405.15624)."""
    return math.log(n) - (n - 1) / n


def combine(rewards_MN: Array, rule: str, k: float = 1.0) -> Array:
    """One reward from several models, `[N]`.

    Args:
        rewards_MN: of the same samples.
        rule: "mean", "min", or "mean_minus_std": the mean less k standard deviations over the models. The last two mistrust what the
            models disagree on, which is where a single model is over-optimised.
        k: of "mean_minus_std".

    Raises:
        ValueError: an unknown rule.
    """
    if rule == "mean":
        return rewards_MN.mean(axis=0)
    if rule == "min":
        return rewards_MN.min(axis=0)
    if rule == "mean_minus_std":
        return rewards_MN.mean(axis=0) - k * rewards_MN.std(axis=0)
    raise ValueError(f"rule={rule!r}: known are mean, min, mean_minus_std")


def sizes_up_to(largest: int) -> list[int]:
    """1, 2, 4, ... and `largest`."""
    return sorted({*(2**i for i in range(largest.bit_length())), largest})


def bootstrap_band(values_PS: Array, seed: int, draws: int = 2000, level: float = 0.95) -> tuple[Array, Array]:
    """Confidence band of the mean over prompts, by resampling prompts.

    Args:
        values_PS: one value a prompt and size.
        seed: of the resampling.
        draws: how many resamples.
        level: share of the means within the band.

    Returns:
        lower and upper end, each `[S]`.
    """
    rng = np.random.default_rng(seed)
    prompts = len(values_PS)
    # A resample is how often each prompt was drawn.
    counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)
    means = counts @ values_PS / prompts
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
