"""A run directory belongs to one process at a time."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from pipelines.run.artifacts import StageError

LOOKED_AT_SECONDS = 0.5
"""A person who asks whether a run goes on holds its lock for less."""


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds a run directory for this process; the lock goes with the process, however it ends.

    Raises:
        StageError: another process holds it, or it cannot be written or locked.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise StageError(f"the run directory {root} cannot be written: {error.strerror}; choose another --run.root") from None
    with lock as file:
        deadline = time.monotonic() + LOOKED_AT_SECONDS
        while not _lock(file, root):
            if time.monotonic() > deadline:
                file.seek(0)
                raise StageError(f"{root} is in use by another process ({file.read().strip()}): wait for it, or choose another --run.name")
            time.sleep(LOOKED_AT_SECONDS / 10)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {os.uname().nodename} since {datetime.now(UTC):%Y-%m-%dT%H:%M:%S%z}")
        file.flush()
        yield


def _lock(file: IO[str], root: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StageError(
            f"{root} cannot be locked: {error.strerror}: its storage has to give file locks (flock), which can be a matter of how it is "
            "mounted; see to it, or choose another --run.root"
        ) from None
    return True
