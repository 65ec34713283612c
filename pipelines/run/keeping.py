"""What is dear to start stays for the next stage: gangs of training workers and pools of actors wait until somebody needs their room.

    stage --borrowed(kind, key, need, start)--> the kept one, if its key is the same, or a new one --> kept until somebody lacks room

Who waits keeps its processes and what they imported: the next policy's weights are read in place. It keeps the CPUs and GPUs that it asked
Ray for, too. So it gives way, who has waited longest first, to a stage that finds too few free ones, that Ray may scale as it goes, or
that lacks memory here; and it goes when it has waited too long, when another of its kind is started, and when one of its processes had
died. On a cluster that has room for all, nothing is started twice; on one that has not, all is as if nothing were kept.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

log = logging.getLogger(__name__)
CLOSE_SECONDS = 20.0
"""in which who waits ends, once told"""
WAITS_FOR_ACTORS = "waits for actors"
"""Name of the threads that do, within Ray, for as long as who they wait for lives."""
SETTLE_SECONDS = 1.5
"""within which Ray says of all nodes what those that have just ended gave back"""


@dataclass(frozen=True)
class Need:
    """What has to be free at one time.

    Args:
        count: processes.
        cpus: that each asks Ray for.
        gpus: that each asks Ray for.
        grows: Ray starts more of them where it finds room, and counts those who wait as its own.
    """

    count: int
    cpus: float
    gpus: float = 0
    grows: bool = False

    def each(self) -> dict[str, float]:
        """What one process asks Ray for, by Ray's names."""
        return {kind: asked for kind, asked in (("CPU", self.cpus), ("GPU", self.gpus)) if asked}

    def room(self, nodes: Mapping[str, Mapping[str, float]]) -> int:
        """For how many processes there is room on nodes with so much of each kind."""
        each = self.each()
        return sum(min((int(has.get(kind, 0) / asked + 1e-9) for kind, asked in each.items()), default=10**9) for has in nodes.values())


class Lasting(Protocol):
    """Who can wait for a next stage."""

    def alive(self) -> bool:
        """Whether all its processes live, and none had to be started again: what it may lose is counted anew for every stage."""

    def close(self) -> None:
        """Ends who waits; when this returns, what it held is free."""


L = TypeVar("L", bound=Lasting)


@dataclass(frozen=True)
class Waiting:
    """Who waits, for whose work, and how long at most."""

    who: Any
    key: str
    timer: threading.Timer


class Keeper:
    """Keeps one of each kind for one job.

    Args:
        seconds: how long one waits at most; 0: nobody outlives its stage.
        spare_bytes: of this machine's memory that have to be available where another is started beside those who wait.
    """

    def __init__(self, seconds: float = 0.0, spare_bytes: float = 0.0):
        self.seconds = seconds
        self.spare_bytes = spare_bytes
        self.kept: dict[str, Waiting] = {}
        """by kind; who has waited longest comes first"""
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def borrowed(self, kind: str, key: str, need: Need, start: Callable[[], L], keep: Callable[[L], bool]) -> Iterator[L]:
        """Somebody for one stage. Who is inside the block when it fails is left alone: it has ended, or the job ends.

        Args:
            kind: one of a kind is kept.
            key: equal for those that can do each other's work.
            need: what a new one needs.
            start: makes a new one.
            keep: whether one can do this stage's work, and wait for more.
        """
        before = self._taken(kind)
        if before and before.key == key and before.who.alive() and keep(before.who):
            found: L = before.who
        else:
            if before:
                before.who.close()
            self.make_room(need)
            found = start()
        yield found
        if self.seconds and keep(found) and found.alive():
            timer = threading.Timer(self.seconds, self._end, (kind, "has waited long enough"))
            timer.daemon = True
            with self.lock:
                self.kept[kind] = Waiting(found, key, timer)
            timer.start()
        else:
            found.close()

    def make_room(self, need: Need) -> None:
        """Ends who waits, one after the other, until there is room, or nobody waits any more."""
        while (kind := next(iter(list(self.kept)), None)) and (need.grows or not self._spare() or not _free(need)):
            self._end(kind, "gives way")

    def close(self) -> None:
        """Ends all who wait."""
        with ThreadPoolExecutor() as threads:
            for kind in list(self.kept):
                threads.submit(self._end, kind, "waits no more")

    def _taken(self, kind: str) -> Waiting | None:
        """From among those who wait."""
        with self.lock:
            found = self.kept.pop(kind, None)
        if found:
            found.timer.cancel()
        return found

    def _end(self, kind: str, why: str) -> None:
        if found := self._taken(kind):
            log.info("%s %s", kind, why)
            found.who.close()

    def _spare(self) -> bool:
        import psutil

        return psutil.virtual_memory().available >= self.spare_bytes


def _free(need: Need) -> bool:
    """Whether there is room beside all that is held."""
    from ray._private.state import available_resources_per_node

    deadline = time.monotonic() + SETTLE_SECONDS
    while need.room(available_resources_per_node()) < need.count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
