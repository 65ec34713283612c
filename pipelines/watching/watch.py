"""Who is told how a run goes: one clock, and any number of watchers behind it.

    Run.do, map_shards, train ...  --Display-->  Watch  --Progress-->  Terminal        a line in the terminal
                                                                      ProgressFile    progress.json, for jobs/status.py
                                                                      Metrics         Prometheus, through Ray
                                                                      JobMetadata     the job's page in Ray's dashboard

A stage says what it does once (`Display.follow`); whoever wants to know more of runs is one watcher more, and no stage changes.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from pipelines.run.artifacts import Display, Stage

log = logging.getLogger(__name__)
TICK_SECONDS = 0.5
NAMES = 3
"""Stages of one call that a title names."""


def title(names: Sequence[str]) -> str:
    """One name for stages that run in one call."""
    more = len(names) - NAMES
    return " + ".join([*names[:NAMES], *([f"{more} more"] if more > 0 else [])])


def iteration(names: Sequence[str]) -> int | None:
    """The newest one that stages belong to; None where they belong to none."""
    found = [int(number) for name in names for number in re.findall(r"(?:^|/)iteration-(\d+)(?:/|$)", name)]
    return max(found, default=None)


@dataclass(frozen=True)
class Progress:
    """How far the running stages have come."""

    stages: tuple[str, ...]
    """names of those of one call"""
    seconds: float
    """since they began"""
    unit: str = ""
    """what is counted: rows, steps, answers; empty before a stage counts"""
    done: int = 0
    total: int | None = None
    """None: nobody knows"""
    per_second: float | None = None
    """units of this attempt; None before a second time that some came"""
    also: Mapping[str, float] = field(default_factory=dict)
    """numbers of the moment, such as restarts"""

    @property
    def title(self) -> str:
        """One name for the stages."""
        return title(self.stages)

    @property
    def counted(self) -> bool:
        """Whether all that is counted is done: what follows is writing and checking."""
        return self.total is not None and self.done >= self.total

    @property
    def left(self) -> float | None:
        """Seconds until all that is counted is done, if it goes on like this."""
        return None if self.total is None or not self.per_second else max(0, self.total - self.done) / self.per_second


class Watcher:
    """Is told by `Watch`. This one is deaf; others hear what they like."""

    def began(self, progress: Progress) -> None:
        """Stages begin."""

    def goes_on(self, progress: Progress) -> None:
        """Twice a second while stages run; comes from a thread of its own."""

    def ended(self, stage: str, seconds: float, skipped: bool, numbers: Mapping[str, Any]) -> None:
        """A stage is done with these numbers in its manifest, or was done before."""

    def over(self, failure: str | None) -> None:
        """The run has ended, or stops here and why."""


class Pace:
    """Units a second, from the first unit on: what an engine needs to start says nothing about its speed.

    Args:
        done: units that were there before.
        now: seconds on any clock.
    """

    def __init__(self, done: int, now: float):
        self._begin(done, now)

    def _begin(self, done: int, now: float) -> None:
        self.before = self.first = self.last = done
        self.met = self.changed = now

    def at(self, done: int, now: float) -> float | None:
        """The pace when `done` are done; None before a second time that some came: the first waited for the start of whoever makes them."""
        if done < self.last:
            # What an earlier attempt had done was taken back.
            self._begin(done, now)
        if done > self.last:
            if self.last == self.before:
                self.first, self.met = done, now
            self.last, self.changed = done, now
        made = self.last - self.first
        if made:
            # As if one more came now, where that is late.
            return made / max(self.changed - self.met, (now - self.met) * made / (made + 1), 1e-9)
        return None


class Watch(Display):
    """The display of a run: counts, keeps time, and tells the watchers, one thing at a time.

    Args:
        watchers: one that raises is told no more, and costs no stage.
    """

    def __init__(self, *watchers: Watcher):
        self.watchers = list(watchers)
        self.running: tuple[str, ...] = ()
        """names of the stages that run"""
        self.began = time.monotonic()
        self.followed: tuple[int | None, str, Callable[[], int], Callable[[], Mapping[str, float]]] | None = None
        self.pace = Pace(0, 0)
        self.lock = threading.RLock()
        self.ending = threading.Event()
        self.clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Watch":
        self.clock.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ending.set()
        # A watcher may wait for a cluster that is gone.
        self.clock.join(timeout=5)

    def started(self, stages: tuple[Stage, ...]) -> None:
        """Tells the watchers."""
        with self.lock:
            self.running, self.began, self.followed = tuple(stage.name for stage in stages), time.monotonic(), None
            log.info("started: %s", ", ".join(self.running))
            self._tell(lambda watcher: watcher.began(Progress(self.running, 0.0)))

    def follow(self, total: int | None, unit: str, done: Callable[[], int], also: Callable[[], Mapping[str, float]] = dict) -> None:
        """From now on `done` and `also` are asked twice a second."""
        with self.lock:
            self.followed, self.pace = (total, unit, done, also), Pace(done(), time.monotonic())

    def finished(self, stage: Stage, seconds: float, skipped: bool, numbers: Mapping[str, Any]) -> None:
        """Tells the watchers, first how far the stages had come."""
        with self.lock:
            if not skipped and self.followed:
                self._look()
            log.info("%s: %s, %.1f s, fingerprint %s", "done before" if skipped else "done", stage.name, seconds, stage.fingerprint)
            self.running, self.followed = tuple(name for name in self.running if name != stage.name), None
            self._tell(lambda watcher: watcher.ended(stage.name, seconds, skipped, numbers))

    def over(self, failure: str | None = None) -> None:
        """The run has ended, or stops here and why."""
        with self.lock:
            self.running = ()
            self._tell(lambda watcher: watcher.over(failure))

    def progress(self) -> Progress | None:
        """How far the running stages have come; None between stages."""
        with self.lock:
            now = time.monotonic()
            if not self.running:
                return None
            if self.followed is None:
                return Progress(self.running, now - self.began)
            total, unit, done, also = self.followed
            count = done()
            return Progress(self.running, now - self.began, unit, count, total, self.pace.at(count, now), also())

    def _tick(self) -> None:
        while not self.ending.wait(TICK_SECONDS):
            self._look()

    def _look(self) -> None:
        with self.lock:
            try:
                progress = self.progress()
            except OSError as error:
                # What is counted lies on a file system that may be away for a moment.
                log.debug("the progress cannot be read: %s", error)
                return
            if progress:
                self._tell(lambda watcher: watcher.goes_on(progress))

    def _tell(self, something: Callable[[Watcher], None]) -> None:
        for watcher in list(self.watchers):
            try:
                something(watcher)
            except Exception as error:
                self.watchers.remove(watcher)
                log.info("%s is told no more: %s: %s", type(watcher).__name__, type(error).__name__, error)
                log.debug("", exc_info=True)
