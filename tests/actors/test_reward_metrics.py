"""Metrics of reward models by hand, and the baselines that know length or writer alone."""

import numpy as np
import pytest

from actors.reward.metrics import accuracy, auc, calibration_error, clustered_error, length_scores, origin_scores, pair_accuracy


def test_accuracy_and_auc_by_hand() -> None:
    positive, negative = np.array([2.0, -1.0, 0.0]), np.array([-3.0, 1.0])
    # Positives: right, wrong, half. Negatives: right, wrong.
    assert accuracy(positive, negative) == pytest.approx((0.5 + 0.5) / 2)
    # Pairs won: 2 beats both, -1 and 0 beat -3 only.
    assert auc(positive, negative) == pytest.approx(4 / 6)
    assert auc(np.array([1.0, 2.0]), np.array([1.0])) == pytest.approx(0.75)


def test_a_pair_counts_by_its_own_two_sides_and_a_tie_half() -> None:
    positive, negative = np.array([2.0, 1.0, -1.0, 0.0]), np.array([-1.0, 1.0, 0.5, -2.0])
    # Won, tied, lost, won.
    assert pair_accuracy(positive, negative) == 2.5 / 4 and pair_accuracy(negative, positive) == 1.5 / 4
    assert pair_accuracy(positive, positive) == 0.5


def test_pairs_of_a_prompt_are_no_independent_ones() -> None:
    values = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    alone = clustered_error(values, list("abcdef"))
    assert alone == pytest.approx(values.std(ddof=1) / 6**0.5)
    # Said twice it is not known better.
    assert clustered_error(np.repeat(values, 2), [name for name in "abcdef" for _ in range(2)]) == pytest.approx(alone)
    assert clustered_error(values, ["a"] * 6) is None


def test_auc_equals_the_count_over_all_pairs() -> None:
    draw = np.random.default_rng(0)
    positive, negative = np.round(draw.normal(0.5, 1, 40), 1), np.round(draw.normal(0, 1, 30), 1)
    wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert auc(positive, negative) == pytest.approx(np.mean(wins))


def test_calibration_by_hand() -> None:
    # Three positives and one negative at log 3: sigmoid is 3/4, and so is the share of positives.
    sure = np.full(3, np.log(3.0))
    assert calibration_error(sure, sure[:1]) == pytest.approx(0, abs=1e-12)
    # The same rewards for negatives alone are off by 3/4.
    assert calibration_error(np.zeros(0), sure) == pytest.approx(0.75)
    assert calibration_error(np.full(2, 1000.0), np.full(2, -1000.0)) == pytest.approx(0), "no overflow"


def test_length_alone_finds_longer_and_shorter_positives() -> None:
    long, short = np.array([8.0, 9.0, 10.0]), np.array([2.0, 3.0, 8.0])
    assert accuracy(*length_scores((long, short), (np.array([12.0, 7.0]), np.array([1.0, 5.0])))) == 0.75, "7 is under the threshold"
    assert accuracy(*length_scores((short, long), (np.array([1.0]), np.array([12.0])))) == 1.0
    assert accuracy(*length_scores((long, long), (long, long))) == 0.5


def test_the_writer_is_known_by_his_words() -> None:
    train = ([[1, 2, 1], [1, 1]], [[3, 2], [3, 3, 2]])
    positive, negative = origin_scores(train, ([[1, 2], [2]], [[3], [2, 3]]), vocabulary=5)
    # Counts with one added: positives 0:1 1:5 2:2 3:1 4:1 of 10, negatives 0:1 1:1 2:3 3:4 4:1 of 10.
    assert positive == pytest.approx([(np.log(5) + np.log(2 / 3)) / 2, np.log(2 / 3)])
    assert negative == pytest.approx([np.log(1 / 4), (np.log(2 / 3) + np.log(1 / 4)) / 2])
