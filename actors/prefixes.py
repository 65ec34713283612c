"""What lists of token ids begin with alike: a model need compute it once."""

import itertools
from collections.abc import Iterable, Sequence


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two lists begin with alike."""
    return next((place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def common_to_all(lists: Iterable[Sequence[int]]) -> int:
    """How many tokens all lists begin with alike; there is one at least."""
    rows = sorted(map(tuple, lists))
    # Of all that lie between two lists in this order, none begins otherwise than both.
    return common(rows[0], rows[-1])


def common_to_another(lists: Sequence[Sequence[int]]) -> list[int]:
    """For each list how many tokens it begins with that another one begins with, too."""
    order = sorted(range(len(lists)), key=lambda number: tuple(lists[number]))
    found = [0] * len(lists)
    for first, second in itertools.pairwise(order):
        alike = common(lists[first], lists[second])
        found[first], found[second] = max(found[first], alike), max(found[second], alike)
    return found
