"""How well a reward tells two kinds of responses apart, and what would do as well without reading them.

Pure functions of numpy arrays. Shapes: P positives, N negatives, of held-out data unless said otherwise.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
TokenIds = Sequence[int] | npt.NDArray[np.int64]


def accuracy(positive_P: Array, negative_N: Array) -> float:
    """Share of responses on their side of zero, both sides counting half; a score of exactly zero is half right."""
    right = (positive_P > 0).mean() + (negative_N < 0).mean() + 0.5 * ((positive_P == 0).mean() + (negative_N == 0).mean())
    return float(right / 2)


def pair_accuracy(positive_P: Array, negative_P: Array) -> float:
    """Share of pairs whose positive scores higher than its own negative, ties counting half."""
    return float((positive_P > negative_P).mean() + 0.5 * (positive_P == negative_P).mean())


def clustered_error(values_P: Array, prompts: Sequence[str]) -> float | None:
    """Standard error of a mean over pairs of which several may share a prompt: those are not independent.

    Args:
        values_P: of the pairs.
        prompts: of each pair.

    Returns:
        None where there is one prompt alone.
    """
    _, places = np.unique(prompts, return_inverse=True)
    sums_G = np.bincount(places, weights=values_P - values_P.mean())
    count = len(sums_G)
    return float(np.sqrt((sums_G**2).sum() * count / (count - 1)) / len(values_P)) if count > 1 else None


def auc(positive_P: Array, negative_N: Array) -> float:
    """Probability that a positive scores higher than a negative, ties counting half: the area under the ROC curve."""
    values, inverse = np.unique(np.concatenate([positive_P, negative_N]), return_inverse=True)
    positives = np.bincount(inverse[: len(positive_P)], minlength=len(values))
    negatives = np.bincount(inverse[len(positive_P) :], minlength=len(values))
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + 0.5 * negatives)).sum() / (len(positive_P) * len(negative_N)))


def calibration_error(positive_P: Array, negative_N: Array, bins: int = 10) -> float:
    """Mean distance between sigmoid(reward) and the share of positives, over bins of sigmoid(reward) by their rows (ECE)."""
    rewards = np.concatenate([positive_P, negative_N])
    labels = np.concatenate([np.ones(len(positive_P)), np.zeros(len(negative_N))])
    chances = 0.5 * (1 + np.tanh(rewards / 2))
    places = np.minimum((chances * bins).astype(int), bins - 1)
    sums = [np.bincount(places, weights=values, minlength=bins) for values in (chances, labels)]
    return float(np.abs(sums[0] - sums[1]).sum() / len(rewards))


def length_scores(train: tuple[Array, Array], held_out: tuple[Array, Array]) -> tuple[Array, Array]:
    """Scores by length alone: the distance from the threshold that does best on training data, on the side that does.

    Args:
        train: lengths of positives and of negatives.
        held_out: the same, to score.
    """
    lengths = np.unique(np.concatenate(train))
    thresholds = np.concatenate([lengths - 0.5, lengths[-1:] + 0.5])
    longer = np.array([accuracy(train[0] - t, train[1] - t) for t in thresholds])
    best = int(np.abs(longer - 0.5).argmax())
    sign = 1.0 if longer[best] >= 0.5 else -1.0
    return sign * (held_out[0] - thresholds[best]), sign * (held_out[1] - thresholds[best])


def origin_scores(
    train: tuple[Sequence[TokenIds], Sequence[TokenIds]], held_out: tuple[Sequence[TokenIds], Sequence[TokenIds]], vocabulary: int
) -> tuple[Array, Array]:
    """Scores by who wrote a response: how much more often its words are those of the positives' writer than of the negatives'.

    A unigram model of each writer with one added to every count; the score is the log of their ratio, per token. It knows words and
    marks, no order and no meaning.

    Args:
        train: token ids of positives and of negatives.
        held_out: the same, to score.
        vocabulary: number of tokens.
    """
    logs = []
    for side in train:
        counts = np.bincount(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in side]), minlength=vocabulary) + 1.0
        logs.append(np.log(counts / counts.sum()))
    ratio_V = logs[0] - logs[1]
    positive_P, negative_N = (np.array([ratio_V[np.asarray(ids, dtype=np.int64)].mean() for ids in side]) for side in held_out)
    return positive_P, negative_N
