"""What happens to workers, told in the job's own log: their words would else stay in files of Ray's on some node.

worker: tell("...") --> RUN/logs/notices/*.txt --> driver: `heard` logs each once and removes it
"""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)
FOLDER = "GSIL_NOTICES"
"""Environment variable of workers: where they leave their notices."""
LISTEN_SECONDS = 1.0


def tell(text: str, folder: str | None = None) -> None:
    """Says something rare that a person should read; in the driver it is a warning, in a worker it becomes one.

    Args:
        text: one line.
        folder: where; by default what the environment says.
    """
    place = folder or os.environ.get(FOLDER)
    if not place:
        log.warning("%s", text)
        return
    # A notice that cannot be left must not stop what it is about.
    with contextlib.suppress(OSError):
        Path(place).mkdir(parents=True, exist_ok=True)
        name = Path(place, os.urandom(8).hex())
        name.with_suffix(".tmp").write_text(f"{text} ({who()})", encoding="utf-8")
        name.with_suffix(".tmp").replace(name.with_suffix(".txt"))


def who() -> str:
    """This process, for a person."""
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextlib.contextmanager
def heard(folder: Path) -> Iterator[None]:
    """Logs, for the length of the block, what workers tell, also what they told a driver that died."""
    over = threading.Event()

    def listen() -> None:
        while not over.wait(LISTEN_SECONDS):
            _log_all(folder)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _log_all(folder)


def _log_all(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob("*.txt"), key=lambda path: path.stat().st_mtime_ns):
            log.warning("%s", path.read_text(encoding="utf-8"))
            path.unlink()
