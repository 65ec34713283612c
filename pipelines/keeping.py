"""What is dear to start stays for the next stage: gangs of training workers and pools of actors wait until somebody needs their room.

    stage --borrowed(key, need, start)--> kept one with that key, or a new one --> kept until the job ends or another stage lacks room

Who waits keeps its processes and what they imported: the next policy's weights are read in place. It keeps the CPUs and GPUs that it asked
Ray for, too; a stage that finds too few free ones ends who has waited longest, until there is room, and who has waited too long gives
back what it holds. So on a cluster that has room for all, nothing is started twice, on one that has not, everything is as if nothing were
kept, and an autoscaler's nodes are not held for nothing.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

log = logging.getLogger(__name__)
SETTLE_SECONDS = 1.5
"""within which Ray says of all nodes what those that have just ended gave back"""


@dataclass(frozen=True)
class Need:
    """What has to be free at one time.

    Args:
        count: processes.
        cpus: that each asks Ray for.
        gpus: that each asks Ray for.
    """

    count: int
    cpus: float
    gpus: float

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
        """Whether it can take more work."""

    def close(self) -> None:
        """Ends it; when this returns, what it held is free."""


L = TypeVar("L", bound=Lasting)


class Keeper:
    """Keeps them for one job.

    Args:
        seconds: how long one waits at most; 0: nobody outlives its stage.
    """

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.kept: dict[str, Lasting] = {}
        """by key; who has waited longest comes first"""
        self.timers: dict[str, threading.Timer] = {}

    @contextlib.contextmanager
    def borrowed(self, key: str, need: Need, start: Callable[[], L], suits: Callable[[L], bool] = lambda kept: True) -> Iterator[L]:
        """Somebody for one stage. Who is inside the block when it fails is not kept.

        Args:
            key: equal for those that can do each other's work.
            need: what a new one needs.
            start: makes a new one.
            suits: whether the kept one can also do this stage's.
        """
        found = self._taken(key)
        if found and not (found.alive() and suits(found)):  # type: ignore[arg-type]
            found.close()
            found = None
        if found is None:
            self.make_room(need)
            found = start()
        try:
            yield found  # type: ignore[misc]
        except BaseException:
            found.close()
            raise
        if self.seconds and found.alive():
            self.kept[key] = found
            self.timers[key] = threading.Timer(self.seconds, self._end, (key, "has waited long enough"))
            self.timers[key].daemon = True
            self.timers[key].start()
        else:
            found.close()

    def _taken(self, key: str) -> Lasting | None:
        """From among those who wait."""
        if timer := self.timers.pop(key, None):
            timer.cancel()
        # One step, which no other thread comes between.
        return self.kept.pop(key, None)

    def _end(self, key: str, why: str) -> None:
        if found := self._taken(key):
            log.info("%s %s", key.partition(" ")[0], why)
            found.close()

    def make_room(self, need: Need) -> None:
        """Ends who waits, one after the other, until there is room, or nobody waits any more."""
        while self.kept and not _free(need):
            self._end(next(iter(self.kept)), "gives way")

    def close(self) -> None:
        """Ends them all."""
        with ThreadPoolExecutor() as threads:
            for key in list(self.kept):
                threads.submit(self._end, key, "is not needed any more")


def _free(need: Need) -> bool:
    """Whether there is room beside all that is held."""
    from ray._private.state import available_resources_per_node

    deadline = time.monotonic() + SETTLE_SECONDS
    while need.room(available_resources_per_node()) < need.count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
