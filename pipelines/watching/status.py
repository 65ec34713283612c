"""Where a run is, how fast it goes and how long still, out of its files alone: no Ray, nothing heavy, from any machine that sees them.

.lock            who holds the directory; the lock itself goes with the process, however it ends
plan.json        the stages that the job set out to do
manifest.json    of each stage that is done, with its seconds
progress.json    how far the running stage is, some seconds old at most, or why the job stopped
summary.json     the job has ended
"""

import fcntl
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.run.artifacts import read_json, write_json
from pipelines.run.plan import Plan, read_plans
from pipelines.watching import states
from pipelines.watching.states import DAMAGED, DONE, RUNNING, SKIPPED, STOPPED, WAITING, StageFacts
from pipelines.watching.watch import Progress, Watcher

FILE = "progress.json"
EVERY_SECONDS = 2.0
"""Between two writes of the progress."""
FRESH_SECONDS = 60.0
"""A process that wrote nothing for so long is gone, or stopped."""
ENDED, DIED = "ended", "died"
INTERRUPTED = "interrupted"
"""Why a job stopped that a person stopped."""


class ProgressFile(Watcher):
    """Writes progress.json: whole, and anew.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.told: dict[str, Any] = {}
        self.written = -EVERY_SECONDS
        self._write({})

    def began(self, progress: Progress) -> None:
        """At once."""
        self._write(_content(progress))

    def goes_on(self, progress: Progress) -> None:
        """Every few seconds."""
        self.told = _content(progress)
        if time.monotonic() - self.written > EVERY_SECONDS:
            self._write(self.told)

    def ended(self, stage: str, seconds: float, skipped: bool, numbers: Mapping[str, Any]) -> None:
        """Nothing runs until the next stage begins."""
        if not skipped:
            self._write({})

    def over(self, failure: str | None) -> None:
        """Writes how far a run that stops had come, and why it stops."""
        self._write(self.told | {"failure": failure})

    def _write(self, content: dict[str, Any]) -> None:
        self.told, self.written = content, time.monotonic()
        write_json(self.path, content | {"at": time.time()})


def _content(progress: Progress) -> dict[str, Any]:
    return {**vars(progress), "also": dict(progress.also), "left": progress.left}


@dataclass(frozen=True)
class Holder:
    """Who took a run directory last."""

    pid: int
    host: str
    since: str
    held: bool
    """whether the lock is held, as far as this machine sees"""

    @property
    def here(self) -> bool:
        """Whether it is a process of this machine: then the lock says all."""
        return self.host == os.uname().nodename


@dataclass(frozen=True)
class StageStatus:
    """A stage of a job."""

    name: str
    state: str
    seconds: float | None = None
    """that it took, or runs"""
    expected: float | None = None
    """that it will take in all, about, if `like` says so: the mean of those that do the same and are done"""
    like: str | None = None
    """the newest of these"""


@dataclass(frozen=True)
class JobStatus:
    """A job in a run directory."""

    run: str
    root: str
    script: str
    """that a person started; empty where the files are of a version that did not write it down"""
    state: str
    """running, stopped, died, ended"""
    said: str
    """about the state, for a person"""
    stages: tuple[StageStatus, ...]
    progress: Mapping[str, Any] = field(default_factory=dict)
    """of the running stages, as in progress.json"""
    seconds: float = 0.0
    """of work so far, also in earlier runs of the same command"""
    left: float | None = None
    """seconds until all stages are done, of those that can be known"""
    unknown: tuple[str, ...] = ()
    """stages of which nobody can say how long they take"""


def look(root: Path, now: float | None = None) -> list[JobStatus]:
    """All jobs that worked in a run directory, in the order in which they were started.

    Args:
        root: the run directory.
        now: Unix seconds.

    Raises:
        ValueError: it is none.
    """
    now = time.time() if now is None else now
    plans, holder = read_plans(root), _holder(root)
    if plans:
        return [_job(root, plan, holder, now) for plan in plans]
    known = list(states.found(root, read_json(root / "summary.json"))) if root.is_dir() else []
    if not known and not holder:
        raise ValueError(f"{root} is no run directory: there is no plan.json in it, and no stage has left a manifest.json")
    state = RUNNING if holder and holder.held else ENDED if any(root.glob("*summary.json")) else STOPPED
    stages = tuple(StageStatus(stage.name, stage.state, stage.seconds) for stage in known)
    said = "there is no plan.json: the stages that are done, without those to do"
    return [JobStatus(root.name, str(root), "", state, said, stages, seconds=sum(stage.seconds or 0 for stage in stages))]


def _holder(root: Path) -> Holder | None:
    """None where nobody ever held it, or this person may not look."""
    try:
        with (root / ".lock").open(encoding="utf-8") as file:
            try:
                # Shared and for a moment: a job that starts now tries for longer.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                held = False
            except BlockingIOError:
                held = True
            except OSError:
                # A file system without locks: how fresh the files are has to do.
                held = False
            found = re.match(r"pid (\d+) on (\S+) since (\S+)", file.read())
    except OSError:
        return None
    return Holder(int(found[1]), found[2], found[3], held) if found else None


def _job(root: Path, plan: Plan, holder: Holder | None, now: float) -> JobStatus:
    progress, summary = read_json(root / f"{plan.prefix}{FILE}") or {}, read_json(root / f"{plan.prefix}summary.json")
    last = max(progress.get("at", 0.0), plan.started)
    state, said = _state(plan, progress, summary, holder, now - last)
    facts = list(states.planned(root, plan.stages, summary, STOPPED))
    kinds = {stage.name: stage.kind for stage in plan.stages}
    done: dict[str, list[StageFacts]] = {}
    for stage in facts:
        if stage.state in (DONE, SKIPPED):
            done.setdefault(kinds[stage.name], []).append(stage)
    told = progress if progress.get("stages") else {}
    # The file is some seconds old.
    running = told["seconds"] + (now - progress["at"] if state == RUNNING else 0) if told else None

    def spent_on(stage: StageFacts) -> float | None:
        return running if stage.name in told.get("stages", ()) else None

    stages = tuple(_stage(stage, done.get(kinds[stage.name], []), state, spent_on(stage)) for stage in facts)
    spent = sum(stage.seconds or 0 for stage in stages if stage.state in (DONE, SKIPPED)) + (running or 0)
    common = (root.name, str(root), plan.script, state, said, stages, told, spent)
    return JobStatus(*common) if state == ENDED else JobStatus(*common, *_left(stages, told if state == RUNNING else {}, running))


def _state(plan: Plan, progress: Mapping[str, Any], summary: Any, holder: Holder | None, quiet: float) -> tuple[str, str]:
    """What the job does, and words about it."""
    who = f"pid {plan.pid} on {plan.host}"
    if summary is not None:
        told = {"stopped early": summary.get("stopped"), "final policy": summary.get("final")}
        return ENDED, "; ".join(f"{what}: {said}" for what, said in told.items() if said)
    if progress.get("failure"):
        mend = "" if progress["failure"] == INTERRUPTED else "when that is mended "
        return STOPPED, f"{duration(quiet)} ago: {progress['failure']}; {mend}the same command continues it"
    mine = holder is not None and (holder.pid, holder.host) == (plan.pid, plan.host)
    if holder and mine and holder.held:
        late = f"; it wrote nothing for {duration(quiet)}" if quiet > FRESH_SECONDS else ""
        return RUNNING, who + late
    if holder and mine and not holder.here and quiet < FRESH_SECONDS:
        return RUNNING, f"{who}, which wrote {duration(quiet)} ago"
    return DIED, f"{who} stopped without a word {duration(quiet)} ago; the same command continues it"


def _stage(stage: StageFacts, like: Sequence[StageFacts], job: str, running: float | None) -> StageStatus:
    if stage.state in (DONE, SKIPPED):
        return StageStatus(stage.name, stage.state, stage.seconds)
    # What an earlier run began and this one has not come to is still to do.
    state = stage.state if job != RUNNING else WAITING if running is None else RUNNING
    # One that shared an engine's start with another was short.
    expected = sum(done.seconds or 0 for done in like) / len(like) if like else None
    return StageStatus(stage.name, state, running, expected, like[-1].name if like else None)


def _left(stages: Sequence[StageStatus], progress: Mapping[str, Any], running: float | None) -> tuple[float, tuple[str, ...]]:
    """Seconds that are left of those stages of which it can be known, and the names of the others."""
    now = [stage for stage in stages if stage.state in (RUNNING, STOPPED)]
    later = [stage for stage in stages if stage.state in (WAITING, DAMAGED)]
    left, unknown = 0.0, [stage.name for stage in later if stage.expected is None]
    if progress.get("left") is not None:
        left += progress["left"]
    elif now and all(stage.expected is not None for stage in now):
        # Stages of one call run together.
        left += max(0.0, sum(stage.expected or 0 for stage in now) - (running or 0 if progress else 0))
    else:
        unknown = [*(stage.name for stage in now), *unknown]
    return left + sum(stage.expected or 0 for stage in later), tuple(unknown)


def duration(seconds: float) -> str:
    """In the units that a person would use."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
