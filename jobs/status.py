"""Tell where runs are, how fast they go and how long still, from their files alone.

    python jobs/status.py runs/NAME [runs/OTHER ...] [--json] [--watch SECONDS]

Asks no Ray and disturbs no run: works from any machine that sees the run directory, while a job goes on, after it ended, and after it was
killed. What is left is estimated from the running stage's own rate and from stages of the same kind that are done.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from pipelines.tables import reader_may_leave
from pipelines.watching.states import DONE, RUNNING, SKIPPED, WAITING
from pipelines.watching.status import ENDED, JobStatus, StageStatus, duration, look
from pipelines.watching.watch import Progress

COLOURS = {"running": "bold", "stopped": "yellow", "died": "red", "damaged": "red", "to do": "dim"}


def main(argv: Sequence[str]) -> int:
    """Prints what is known; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--json", action="store_true", help="one JSON object a job, on a line")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="look again after so many seconds, until Ctrl-C")
    options = parser.parse_args(argv)
    # A shell that starts it in the background has it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    console = Console()
    try:
        with reader_may_leave():
            _look(options, console)
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _look(options: argparse.Namespace, console: Console) -> None:
    while True:
        found = [job for root in options.runs for job in look(root)]
        if options.watch is not None and not options.json:
            console.clear()
        for job in found:
            if options.json:
                print(json.dumps(asdict(job), ensure_ascii=False), flush=True)
            else:
                show(job, console)
        if options.watch is None:
            return
        time.sleep(options.watch)


def show(job: JobStatus, console: Console) -> None:
    """A job for a person: what it does, its stages, how long still."""
    said = f" ({job.said})" if job.said else ""
    console.print(
        f"{job.root}: {job.script} {job.state}{said}", style=COLOURS.get(job.state), highlight=False, soft_wrap=True, markup=False
    )
    grid = Table(
        Column("stage", no_wrap=True),
        "state",
        Column("time", justify="right", no_wrap=True),
        Column("", overflow="fold"),
        box=SIMPLE,
        pad_edge=False,
    )
    running = _progress(job)
    for stage in job.stages:
        state = "not needed" if job.state == ENDED and stage.state == WAITING else stage.state
        more = running if stage.name in job.progress.get("stages", ()) else f"as {stage.like}" if stage.like else ""
        grid.add_row(stage.name, state, _time(stage), more, style=COLOURS.get(stage.state))
    console.print(grid)
    for line in _ends(job):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _time(stage: StageStatus) -> str:
    if stage.seconds is not None:
        return duration(stage.seconds)
    return "" if stage.expected is None else f"~{duration(stage.expected)}"


def _progress(job: JobStatus) -> str:
    """What the running stages have done, how fast, and what is left of them."""
    if not job.progress:
        return ""
    progress = Progress(**{key: value for key, value in job.progress.items() if key in Progress.__dataclass_fields__})
    if not progress.unit:
        return "starting" if job.state == RUNNING else ""
    told = [f"{progress.done}{'' if progress.total is None else f' of {progress.total}'} {progress.unit}"]
    if job.state == RUNNING and progress.counted:
        told.append("finishing")
    elif job.state == RUNNING:
        speed = progress.per_second
        told += [(f"{speed:.1f} a second" if speed > 1 else f"{1 / speed:.1f} s each") if speed else "starting"]
        told += [f"{duration(progress.left)} left"] if progress.left is not None else []
    told += [f"{value:.0f} {name.replace('_per_second', ' a second')}" for name, value in progress.also.items() if value]
    return ", ".join(told)


def _ends(job: JobStatus) -> Iterator[str]:
    """How much is done, and how long the rest takes."""
    done = sum(stage.state in (DONE, SKIPPED) for stage in job.stages)
    yield f"{done} of {len(job.stages)} stages, {duration(job.seconds)} of work"
    if job.left is None:
        return
    until = datetime.fromtimestamp(time.time() + job.left).strftime(", until %H:%M") if job.state == RUNNING else ""
    if not job.unknown:
        yield f"left: about {duration(job.left)}{until if job.left < 86400 else ''}, if no stage is left out"
    else:
        names = ", ".join(job.unknown[:4]) + (f" and {len(job.unknown) - 4} more" if len(job.unknown) > 4 else "")
        least = f"at least {duration(job.left)}; " if job.left else ""
        yield f"left: {least}not known of {names}: no stage of the kind is done yet"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
