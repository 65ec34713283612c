"""From the verdicts of a tournament to numbers. Pure functions.

Legend of shapes: G games, one of two contestants on one prompt; C contestants; R resamples of the prompts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from actors.judge.verdicts import Reading

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ELO = 400 / np.log(10)
"""Points of an Elo rating for one nat of log odds."""
PRIOR = 0.1
"""Weight of a won and of a lost game that each contestant is given against an average one: who won all has a finite rating."""
RESAMPLES = 1_000
EITHER_SIDE = 5
"""Games in which the first response is no longer, and in which it is no shorter, that a win rate at equal length needs."""


def shares(outcomes: Sequence[Reading]) -> dict[str, float | int | None]:
    """Win, tie and lose of the first of two contestants, shares of the games that could be read, with standard errors.

    Args:
        outcomes: 0 where the first one won, 1 where the second did, "tie", "unparsed".
    """
    read = [outcome for outcome in outcomes if outcome != "unparsed"]
    found: dict[str, float | int | None] = {"n": len(read), "unparsed": len(outcomes) - len(read)}
    kinds: dict[str, Literal[0, 1, "tie"]] = {"win": 0, "tie": "tie", "lose": 1}
    for name, kind in kinds.items():
        share = read.count(kind) / len(read) if read else None
        error = None if share is None else float(np.sqrt(share * (1 - share) / len(read)))
        found |= {name: share, f"{name}_stderr": error}
    return found


def points(outcome: Reading) -> float:
    """Points of the first contestant: 1 for a win, 1/2 for a tie, else 0. What could not be read is no game."""
    assert outcome != "unparsed"
    return 0.5 if outcome == "tie" else 1.0 - outcome


def bradley_terry(first_G: Ints, second_G: Ints, points_G: Floats, contestants: int, weights_G: Floats | None = None) -> Floats:
    """Strengths [C], nats of log odds with mean 0, of the Bradley-Terry model (Bradley and Terry 1952): P(i beats j) = sigmoid(s_i - s_j).

    Args:
        first_G: number of the first contestant.
        second_G: and of the second.
        points_G: of the first, see `points`.
        contestants: C.
        weights_G: how often each game counts.
    """
    weights = np.ones_like(points_G) if weights_G is None else weights_G
    strengths = np.zeros(contestants)
    for _ in range(100):
        p = 1 / (1 + np.exp(strengths[second_G] - strengths[first_G]))
        own = 1 / (1 + np.exp(-strengths))
        gradient = PRIOR * (1 - 2 * own)
        np.add.at(gradient, first_G, weights * (points_G - p))
        np.add.at(gradient, second_G, -weights * (points_G - p))
        curvature = np.diag(2 * PRIOR * own * (1 - own))
        bend = weights * p * (1 - p)
        for i, j, sign in ((first_G, first_G, 1), (second_G, second_G, 1), (first_G, second_G, -1), (second_G, first_G, -1)):
            np.add.at(curvature, (i, j), sign * bend)
        step = np.linalg.solve(curvature, gradient)
        # Newton's steps, kept short: far away from the solution the curvature says little.
        strengths = strengths + step * min(1.0, 2.0 / max(1e-12, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-10:
            break
    centred: Floats = strengths - strengths.mean()
    return centred


def ranking(names: Sequence[str], games: Sequence[tuple[str, int, int, float]], seed: int = 0) -> list[dict[str, float | str | int]]:
    """Contestants by their Elo rating (mean 1000), best first, with a 95 % band by bootstrap over prompts.

    Args:
        names: of the contestants.
        games: (prompt, first, second, points of the first).
        seed: of the bootstrap.
    """
    if not games:
        return []
    first, second, won = (np.array([game[k] for game in games]) for k in (1, 2, 3))
    rating = 1000 + ELO * bradley_terry(first, second, won.astype(float), len(names))
    prompts = _numbers([game[0] for game in games])
    resampled_RC = _bootstrap(prompts, seed, lambda weights: bradley_terry(first, second, won.astype(float), len(names), weights))
    low, high = 1000 + ELO * np.quantile(resampled_RC, (0.025, 0.975), axis=0)
    played = np.bincount(np.concatenate([first, second]), minlength=len(names))
    rows: list[dict[str, float | str | int]] = [
        {"name": name, "rating": float(rating[k]), "low": float(low[k]), "high": float(high[k]), "games": int(played[k])}
        for k, name in enumerate(names)
    ]
    return sorted(rows, key=lambda row: -float(row["rating"]))


def length_controlled(points_G: Floats, longer_G: Floats, prompts: Sequence[str], seed: int = 0) -> dict[str, float] | None:
    """Win rate of the first contestant as if its responses were as long as the second's (the idea of Dubois et al. 2024, arXiv
    2404.04475, without their term for the prompt): logistic regression of the points on the difference in length, read at 0.

    Args:
        points_G: of the first contestant.
        longer_G: by how many characters its response is longer.
        prompts: of each game.
        seed: of the bootstrap.

    Returns:
        `rate` and its standard error `stderr` by bootstrap over prompts; None where the lengths leave it open: one side nearly always
        longer, or a single prompt.
    """
    if min((longer_G <= 0).sum(), (longer_G >= 0).sum()) < EITHER_SIDE or len(set(prompts)) < 2:
        return None
    spread = float(np.std(longer_G)) or 1.0
    features = np.stack([np.ones_like(points_G), np.tanh(longer_G / spread)], axis=1)

    def rate(weights: Floats) -> Floats:
        return 1 / (1 + np.exp(-_logistic(features, points_G, weights)[:1]))

    resampled = _bootstrap(_numbers(prompts), seed, rate, resamples=200)
    return {"rate": float(rate(np.ones_like(points_G))[0]), "stderr": float(np.std(resampled, ddof=1))}


def _logistic(features: Floats, points_G: Floats, weights: Floats) -> Floats:
    """Coefficients by Newton's steps, with a small ridge: all won or all lost is no infinity."""
    ridge = np.eye(features.shape[1]) * PRIOR
    coefficients = np.zeros(features.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-features @ coefficients))
        gradient = features.T @ (weights * (points_G - p)) - ridge @ coefficients
        curvature = (features * (weights * p * (1 - p))[:, None]).T @ features + ridge
        step = np.linalg.solve(curvature, gradient)
        coefficients = coefficients + step * min(1.0, 2.0 / max(1e-12, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-10:
            break
    return coefficients


def position_bias(readings: Sequence[tuple[Reading, Reading]]) -> dict[str, float | int | None]:
    """How often a judge prefers what it is shown first, and agrees with itself.

    Args:
        readings: of each game in both orders, both told of the order (a, b); in the second order b was shown first.

    Returns:
        `first`: share of the `answers` with a winner that name the one shown first (no bias: 1/2), `stderr` of it and `p`, the chance of
        as uneven games without bias, both over games; `consistent`: share of the `n` games that could be read in which both orders say the
        same.
    """
    games = [[reading == shown for reading, shown in zip(pair, (0, 1), strict=True) if reading in (0, 1)] for pair in readings]
    answers, preferred = sum(map(len, games)), sum(map(sum, games))
    read = [pair for pair in readings if "unparsed" not in pair]
    first = preferred / answers if answers else None
    return {
        "first": first,
        "answers": answers,
        "stderr": None if first is None else math.sqrt(sum((sum(game) - first * len(game)) ** 2 for game in games)) / answers,
        "p": _signs([2 * sum(game) - len(game) for game in games]),
        "consistent": sum(a == b for a, b in read) / len(read) if read else None,
        "n": len(read),
    }


def _signs(values: Sequence[int]) -> float:
    """Chance of as uneven signs, or more, where either is as likely: the two-sided test of signs, exact."""
    n, positive = sum(value != 0 for value in values), sum(value > 0 for value in values)
    # In logs: of many games the numbers of ways are too large for floats.
    ways = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(positive, n - positive) + 1))
    return min(1.0, 2 * sum(math.exp(log_ways - n * math.log(2)) for log_ways in ways))


def _numbers(prompts: Sequence[str]) -> Ints:
    known: dict[str, int] = {}
    return np.array([known.setdefault(prompt, len(known)) for prompt in prompts])


def _bootstrap(prompts: Ints, seed: int, statistic: Callable[[Floats], Floats], resamples: int = RESAMPLES) -> Floats:
    """The statistic over resamples of the prompts [R, ...]: games on one prompt are not independent."""
    count = int(prompts.max()) + 1
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    return np.stack([statistic(weights[prompts]) for weights in drawn])
