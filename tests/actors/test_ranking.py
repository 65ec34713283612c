"""Win rates, rankings and the judge's own faults, from verdicts."""

import math
from typing import Any

import numpy as np
import pytest

from actors.judge.ranking import ELO, PRIOR, bradley_terry, length_controlled, position_bias, ranking, shares


def test_shares_count_what_could_be_read() -> None:
    found = shares([0, 0, 0, 1, "tie", "unparsed"])
    assert found["n"] == 5 and found["unparsed"] == 1
    assert (found["win"], found["tie"], found["lose"]) == (0.6, 0.2, 0.2)
    assert found["win_stderr"] == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    assert shares(["unparsed"])["win"] is None


def games(table: dict[tuple[int, int], tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Games of i against j of which i won the first number of the second."""
    rows = [(i, j, float(k < won)) for (i, j), (won, of) in table.items() for k in range(of)]
    first, second, points = zip(*rows, strict=True)
    return np.array(first), np.array(second), np.array(points)


def test_two_contestants_have_the_odds_of_their_games() -> None:
    # With g games, of which w are won, and the prior's games against 0: (w - g p) + PRIOR (1 - 2 q) = 0.
    strengths = bradley_terry(*games({(0, 1): (7500, 10000)}), contestants=2)
    assert strengths[0] - strengths[1] == pytest.approx(math.log(3), abs=1e-3) and strengths.sum() == pytest.approx(0)


def test_strengths_that_made_the_games_are_found_again() -> None:
    want = np.array([1.0, 0.0, -0.5, -0.5])
    wins = {}
    for i in range(4):
        for j in range(i + 1, 4):
            wins[i, j] = round(20000 / (1 + math.exp(want[j] - want[i]))), 20000
    assert bradley_terry(*games(wins), contestants=4) == pytest.approx(want, abs=2e-3)


def test_who_won_all_has_a_finite_rating() -> None:
    strengths = bradley_terry(*games({(0, 1): (5, 5)}), contestants=2)
    p, q = 1 / (1 + math.exp(strengths[1] - strengths[0])), 1 / (1 + math.exp(-strengths[0]))
    assert 5 * (1 - p) == pytest.approx(PRIOR * (2 * q - 1), abs=1e-6) and np.isfinite(strengths).all()


def test_a_ranking_has_bands_over_prompts() -> None:
    played = [(f"p{k}", 0, 1, float(k % 4 != 0)) for k in range(200)] + [(f"p{k}", 1, 2, 0.5) for k in range(200)]
    rows = ranking(["a", "b", "c"], played)
    assert rows[0]["name"] == "a" and [row["games"] for row in rows if row["name"] == "b"] == [400]
    by_name = {row["name"]: row for row in rows}
    gap = float(by_name["a"]["rating"]) - float(by_name["b"]["rating"])
    assert gap == pytest.approx(ELO * math.log(3), rel=0.02)
    assert all(float(row["low"]) < float(row["rating"]) < float(row["high"]) for row in rows)
    # The same prompts drawn once more say nothing new: the band stays.
    doubled = {row["name"]: row for row in ranking(["a", "b", "c"], played * 2)}
    width = [float(found["a"]["high"]) - float(found["a"]["low"]) for found in (by_name, doubled)]
    assert width[1] == pytest.approx(width[0], rel=0.1)
    assert ranking(["a", "b"], []) == []


def test_a_win_rate_that_length_explains_goes_to_one_half() -> None:
    generator = np.random.default_rng(0)
    longer = generator.normal(50, 100, 4000)
    won = (generator.random(4000) < 1 / (1 + np.exp(-3 * np.tanh(longer / longer.std())))).astype(float)
    prompts = [str(k) for k in range(4000)]
    found = length_controlled(won, longer, prompts)
    assert won.mean() > 0.6 and found and found["rate"] == pytest.approx(0.5, abs=3 * found["stderr"])
    fair = length_controlled(np.array([1.0, 1.0, 0.0, 1.0] * 50), np.zeros(200), prompts[:200])
    assert fair and fair["rate"] == pytest.approx(0.75, abs=0.01) and fair["stderr"] == pytest.approx(0.03, abs=0.01)
    assert length_controlled(np.array([]), np.array([]), []) is None
    always = np.linspace(50, 200, 100)
    assert length_controlled(np.ones(100), always, prompts[:100]) is None, "what wins at equal length was never seen"
    assert length_controlled(won[:50], longer[:50], ["the same"] * 50) is None
    assert length_controlled(np.ones(100), np.where(np.arange(100) < 5, -always, always), prompts[:100])


def test_faults_of_a_judge() -> None:
    # Always the one shown first: in the second order that is the second of the pair.
    biased = position_bias([(0, 1)] * 10)
    assert (biased["first"], biased["consistent"], biased["n"]) == (1.0, 0.0, 10)
    fair = position_bias([(0, 0), (1, 1), ("tie", "tie"), ("unparsed", 0)])
    assert fair["consistent"] == 1.0 and fair["n"] == 3 and fair["first"] == pytest.approx(2 / 5)
    assert position_bias([])["first"] is None
    # Five of six games name the one shown first in both orders, one the other: 7 of the 64 ways to fall, and as many the other way.
    games: Any = [*[(0, 1)] * 5, (1, 0), (0, 0), ("tie", "tie")]
    uneven: Any = position_bias(games)
    assert uneven["first"] == pytest.approx(11 / 14) and uneven["p"] == pytest.approx(14 / 64)
    # The two answers of a game are no two proofs: five times 2 - 11/7, once 11/7, once 1 - 11/7.
    assert uneven["stderr"] == pytest.approx((5 * (3 / 7) ** 2 + (11 / 7) ** 2 + (4 / 7) ** 2) ** 0.5 / 14)
    assert position_bias([(0, 1)])["p"] == 1.0 and biased["p"] == pytest.approx(2 / 2**10) and fair["p"] == 1.0
