"""Demonstrations that the project makes itself, by the names that `demonstrations.path` has for them. Imports nothing heavy."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipelines.data import arithmetic, replies


@dataclass(frozen=True)
class Generated:
    """Data without a file."""

    draw: Callable[[int, int, bool], Iterator[dict[str, str]]]
    """(count, seed, held out) -> rows; raises ValueError where there are not so many"""
    version: int
    """raised when other rows come out"""
    layout: str
    """of its rows"""


GENERATED = {
    "arithmetic": Generated(arithmetic.problems, arithmetic.VERSION, "question_answer"),
    "replies": Generated(replies.replies, replies.VERSION, "prompt_completion"),
}
