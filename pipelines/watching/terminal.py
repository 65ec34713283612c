"""One live display of a run in a terminal; plain lines where the output is a file or a job's log."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from pipelines.tables import Shown
from pipelines.watching import watch

NARROW = 34
"""Letters for what runs, beside bar, counts and pace in a terminal of 100 columns."""
PLAIN_EVERY_SECONDS = 30.0
"""Between two lines of a running stage, where there is no terminal."""


class Terminal(watch.Watcher):
    """Shows the stages: done ones as lines, the running one with what is done, its rate and the time left."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
        )
        # Else it would show what libraries print.
        self.bars = Progress(*columns, console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False)
        self.live = self.console.is_terminal
        self.task: TaskID | None = None
        self.said = time.monotonic()

    def __enter__(self) -> "Terminal":
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._clear()
        if self.live:
            self.bars.stop()

    def began(self, progress: watch.Progress) -> None:
        self.said = time.monotonic()
        if self.live:
            self.task = self.bars.add_task(short(progress.stages), total=None, rate="starting")
        else:
            self.say(f"  {progress.title} ...")

    def goes_on(self, progress: watch.Progress) -> None:
        if not progress.unit:
            return
        if self.task is not None:
            self.bars.update(self.task, completed=progress.done, total=progress.total, rate=rate(progress))
        elif not self.live and time.monotonic() - self.said > PLAIN_EVERY_SECONDS:
            self.said = time.monotonic()
            self.say(f"  {progress.title}: {progress.done}{'' if progress.total is None else f'/{progress.total}'} {rate(progress)}")

    def ended(self, stage: str, seconds: float, skipped: bool, numbers: Mapping[str, Any]) -> None:
        self._clear()
        self.console.print(f"  [dim]= {stage}, done before[/dim]" if skipped else f"  + {stage}  {seconds:.1f} s", highlight=False)

    def say(self, text: str) -> None:
        """A line above the display."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _clear(self) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
        self.task = None


def short(stages: Sequence[str]) -> str:
    """A name for stages that leaves room for what is counted."""
    more = f" + {len(stages) - 1} more" if len(stages) > 1 else ""
    room = NARROW - len(more)
    return (stages[0] if len(stages[0]) <= room else f"...{stages[0][3 - room :]}") + more


def rate(progress: watch.Progress) -> str:
    """How fast stages go on, and what is left of them."""
    speed, left = progress.per_second, progress.left
    if progress.counted:
        return f"{progress.unit}, finishing"
    if not speed:
        return progress.unit if progress.done else f"{progress.unit}, starting"
    told = f"{speed:.1f}/s" if speed > 1 else f"{1 / speed:.1f} s each"
    return f"{progress.unit}, {told}" + ("" if left is None else f", {left:.0f} s left")


@contextlib.contextmanager
def chatter_to(path: Path) -> Iterator[Console]:
    """Sends what libraries print, also from C++, to a file for the length of the block.

    Yields:
        a console on the real standard output.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with path.open("ab") as file, os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield Console(file=out)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def print_result(shown: Shown) -> None:
    """The final tables and where everything is."""
    console = Console()
    for table in shown.tables:
        # A name or a word that is cut could be another one, and a number keeps its error: a terminal too narrow folds whole lines.
        names, *others = zip(*table.rows, strict=True)
        words = [" ".join(cells).replace(" ± ", "_±_").split() for cells in others]
        least = [max(map(cell_len, names)), *(max(map(cell_len, each), default=0) for each in words)]
        # As text: brackets in a name are no markup.
        heads = map(Text, table.rows[0])
        columns = (Column(head, min_width=width, no_wrap=not k) for k, (head, width) in enumerate(zip(heads, least, strict=True)))
        grid = Table(*columns, title=Text(table.title))
        for row in table.rows[1:]:
            grid.add_row(*map(Text, row), style="bold" if row[0] == table.bold else "")
        borders = 3 * len(least) + 1
        Console(width=max(console.width, sum(least) + borders)).print(grid, crop=False)
    for line in shown.lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
