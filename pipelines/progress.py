"""One live display of a run in a terminal; plain lines where the output is a file or a job's log."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from pipelines.artifacts import Display, Stage
from pipelines.summary import Shown

log = logging.getLogger(__name__)
PLAIN_EVERY_SECONDS = 30.0
"""Between two lines of a running stage, where there is no terminal."""
TITLES = 3
"""Names of stages that run together, on a line."""


def titled(names: Sequence[str]) -> str:
    """Stages that run together, on a line."""
    return " + ".join(names) if len(names) <= TITLES else f"{' + '.join(names[:TITLES])} + {len(names) - TITLES} more"


class Terminal(Display):
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
        self.bars = Progress(*columns, console=self.console, transient=True)
        self.live = self.console.is_terminal
        self.done: Callable[[], int] | None = None
        self.task: TaskID | None = None
        self.title = self.unit = ""
        self.total: int | None = None
        self.before = 0
        self.since = self.said = time.monotonic()
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Terminal":
        if self.live:
            self.bars.start()
        self.watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.over.set()
        self.watcher.join()
        self._clear()
        if self.live:
            self.bars.stop()

    def started(self, stages: tuple[Stage, ...]) -> None:
        log.info("started: %s", ", ".join(stage.name for stage in stages))
        with self.lock:
            self.title, self.unit, self.total, self.done = titled([stage.name for stage in stages]), "", None, None
            self.since = self.said = time.monotonic()
            if self.live:
                self.task = self.bars.add_task(self.title, total=None, rate="starting")
            else:
                self.say(f"  {self.title} ...")

    def follow(self, total: int | None, unit: str, done: Callable[[], int]) -> None:
        with self.lock:
            self.total, self.unit, self.done, self.before = total, unit, done, done()
            self.since = time.monotonic()

    def finished(self, stage: Stage, seconds: float, skipped: bool) -> None:
        log.info("%s: %s, %.1f s, fingerprint %s", "done before" if skipped else "done", stage.name, seconds, stage.fingerprint)
        self._clear()
        self.console.print(
            f"  [dim]= {stage.name}, done before[/dim]" if skipped else f"  + {stage.name}  {seconds:.1f} s", highlight=False
        )

    def say(self, text: str) -> None:
        """A line above the display."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _clear(self) -> None:
        with self.lock:
            if self.task is not None:
                self.bars.remove_task(self.task)
            self.task, self.done = None, None

    def _watch(self) -> None:
        while not self.over.wait(0.5):
            with self.lock:
                if self.done is None:
                    continue
                count = self.done()
                if count < self.before:
                    # What an earlier attempt had done was taken back.
                    self.before, self.since = count, time.monotonic()
                rate = self._rate(count)
                if self.task is not None:
                    self.bars.update(self.task, completed=count, total=self.total, rate=rate)
                elif not self.live and time.monotonic() - self.said > PLAIN_EVERY_SECONDS:
                    self.said = time.monotonic()
                    self.say(f"  {self.title}: {count}{'' if self.total is None else f'/{self.total}'} {rate}")

    def _rate(self, count: int) -> str:
        passed, made = time.monotonic() - self.since, count - self.before
        if not made:
            return f"{self.unit}, starting"
        speed = f"{made / passed:.1f}/s" if made > passed else f"{passed / made:.1f} s each"
        left = "" if self.total is None else f", {(self.total - count) * passed / made:.0f} s left"
        return f"{self.unit}, {speed}{left}"


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


def set_up_logs(folder: Path, display: Terminal) -> None:
    """The whole log to job.log, warnings also to the terminal."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            display.say(f"  {record.levelname.lower()}: {record.getMessage()}")

    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / "job.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    shown = Lines(logging.WARNING)
    # Ours only: libraries warn about themselves.
    shown.addFilter(lambda record: record.name.split(".")[0] in ("gsil", "pipelines", "actors", "jobs"))
    logging.basicConfig(level=logging.INFO, handlers=[file, shown], force=True)


def print_result(shown: Shown) -> None:
    """The final tables and where everything is."""
    console = Console()
    for table in shown.tables:
        first, *others = table.rows[0]
        # A name that is cut could be another one.
        grid = Table(Column(first, no_wrap=True), *(Column(name, overflow="fold") for name in others), title=table.title)
        for row in table.rows[1:]:
            grid.add_row(*row, style="bold" if row[0] == table.bold else "")
        console.print(grid)
    for line in shown.lines:
        console.print(line, highlight=False, soft_wrap=True)
