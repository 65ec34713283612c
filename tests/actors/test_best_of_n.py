"""The best of n: the exact estimator against all subsets, combination rules, bands."""

import itertools
import math

import numpy as np
import pytest

from actors.reward.best_of_n import bootstrap_band, chosen_with_probability, combine, kl_to_policy, sizes_up_to


def brute_force(scores: list[float], values: list[float], n: int) -> float:
    """The mean over all subsets of size n of the mean value of their best samples."""
    results = []
    for subset in itertools.combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        winners = [values[i] for i in subset if scores[i] == best]
        results.append(sum(winners) / len(winners))
    return sum(results) / len(results)


@pytest.mark.parametrize(
    "scores",
    [[0.3, -1.0, 2.5, 0.1, 0.9, -0.2, 1.1], [1.0, 1.0, 0.0, 2.0, 2.0, 2.0, 0.0], [0.0] * 7, [5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0]],
)
def test_expectations_equal_the_mean_over_all_subsets(scores: list[float]) -> None:
    values = [1.0, 0.0, 0.0, 1.0, 0.5, -2.0, 3.0]
    sizes = list(range(1, 8))
    weights = chosen_with_probability(np.array(scores), sizes)
    assert weights.sum(axis=1) == pytest.approx(np.ones(7))
    assert weights @ np.array(values) == pytest.approx([brute_force(scores, values, n) for n in sizes])


def test_a_thousand_samples_are_no_trouble() -> None:
    scores = np.random.default_rng(0).normal(size=1000)
    weights = chosen_with_probability(scores, [1, 10, 1000])
    assert weights[0] == pytest.approx(np.full(1000, 1e-3)) and weights[2, scores.argmax()] == 1
    # The expected maximum of ten standard normal draws is 1.5388 (tables of order statistics); these are 1,000 of them.
    assert weights[1] @ scores == pytest.approx(1.5388, abs=0.15)


@pytest.mark.parametrize(
    ("sizes", "scores", "words"), [([0], [1.0], "1 <= n <= 1"), ([3], [1.0, 2.0], "not 3"), ([1], [math.nan], "finite")]
)
def test_what_cannot_be_chosen_from_is_refused(sizes: list[int], scores: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        chosen_with_probability(np.array(scores), sizes)


def test_every_rule_by_hand() -> None:
    rewards = np.array([[1.0, 4.0], [3.0, 0.0]])
    assert combine(rewards, "mean").tolist() == [2.0, 2.0]
    assert combine(rewards, "min").tolist() == [1.0, 0.0]
    assert combine(rewards, "mean_minus_std", k=0.5).tolist() == [1.5, 1.0]
    with pytest.raises(ValueError, match="rule='max': known are mean, min, mean_minus_std"):
        combine(rewards, "max")


def test_divergence_and_sizes() -> None:
    assert kl_to_policy(1) == 0 and kl_to_policy(4) == pytest.approx(math.log(4) - 0.75)
    assert sizes_up_to(64) == [1, 2, 4, 8, 16, 32, 64] and sizes_up_to(6) == [1, 2, 4, 6] and sizes_up_to(1) == [1]


def test_the_band_is_that_of_a_mean() -> None:
    values = np.random.default_rng(0).normal([0.0, 5.0], size=(400, 2))
    low, high = bootstrap_band(values, seed=1)
    # 1.96 standard errors to each side.
    error = 1.96 * values.std(axis=0) / 20
    assert low == pytest.approx(values.mean(axis=0) - error, abs=0.02) and high == pytest.approx(values.mean(axis=0) + error, abs=0.02)
    assert np.array_equal(bootstrap_band(values, seed=1)[0], low)
