"""Tables for a person, in the terminal and in Markdown."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table in the terminal."""

    title: str
    rows: Sequence[Sequence[str]]
    """the header first"""
    bold: str = ""
    """first cell of the row that stands out"""


@dataclass(frozen=True)
class Shown:
    """What a person sees when a job has ended."""

    tables: list[Table]
    lines: list[str]


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """For what is printed inside: whoever reads only its first lines (`| head`) closes the pipe, which is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def filled(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """A table without those columns, but for the first, in which no row has anything; the header is the first row."""
    kept = [k for k in range(len(rows[0])) if not k or any(row[k] for row in rows[1:])]
    return [[row[k] for k in kept] for row in rows]


def ruled(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the header is the first row."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
