"""How sure a difference is: few seeds, every arm on the same seeds and the same problems.

Shapes: S seeds, P problems.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines import means

EXACT_UP_TO = 16
"""Seeds whose sign flips are all tried."""


@dataclass(frozen=True)
class Paired:
    """A difference over seeds."""

    mean: float
    stderr: float | None
    """over seeds; None of a single one"""
    p: float
    """two-sided, see `sign_flip`"""
    seeds: int


def mean_and_error(values_S: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds and its standard error."""
    mean, error = means.mean_and_error(values_S)
    assert mean is not None, "one seed at least"
    return mean, error


def paired(ours_S: Sequence[float], theirs_S: Sequence[float]) -> Paired:
    """The difference of two arms on the same seeds.

    Raises:
        ValueError: they have not the same seeds.
    """
    differences = [a - b for a, b in zip(ours_S, theirs_S, strict=True)]
    mean, error = mean_and_error(differences)
    return Paired(mean, error, sign_flip(differences), len(differences))


def sign_flip(differences_S: Sequence[float]) -> float:
    """Exact two-sided permutation test of a mean of 0: the share of all 2^S choices of signs whose mean is at least as far from 0.

    It assumes that under the null hypothesis a seed's difference is as likely to have the other sign (exchangeable arms), and nothing of
    its distribution. With S seeds no p is below 2 / 2^S: 0.5 with two, 0.0625 with five.

    Raises:
        ValueError: more than `EXACT_UP_TO` seeds.
    """
    if len(differences_S) > EXACT_UP_TO:
        raise ValueError(f"{len(differences_S)} seeds have too many sign flips: {EXACT_UP_TO} at most")
    observed = abs(sum(differences_S))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences_S, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences_S))
    ]
    return sum(total >= observed - 1e-12 for total in sums) / len(sums)


def stratified(differences_SP: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean difference and its standard error over problems, the seeds taken as given: what more test problems could tell, not what more
    seeds could.

    Args:
        differences_SP: of two arms, for each seed one a problem; two problems at least.
    """
    found = [mean_and_error(row) for row in differences_SP]
    n = len(found)
    return sum(mean for mean, _ in found) / n, math.sqrt(sum((error or 0.0) ** 2 for _, error in found)) / n


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several comparisons corrected together (Holm 1979): the chance of a single false one among them."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
