"""How many rows of an unfinished shard are made, in a file beside the shard: from the actor to the driver's display."""

import contextlib
import time
from pathlib import Path

from actors.notices import tell, who


class Tally:
    """Tells the driver's display how many rows of an unfinished shard are made, about once a second, in a file beside the shard."""

    def __init__(self, output: Path):
        self.path = tally_of(output)
        self.said = time.monotonic()

    def begin(self) -> None:
        """Says who makes the shard; a tally that is there is of one who ended before its shard did."""
        if left := counted(self.path):
            rows, by = left
            tell(f"{self.path.parent.name}/{self.path.name[1:-5]}: made anew, {by or 'who made it'} ended after {rows} rows of it")
        self._write(0)

    def __call__(self, rows: int) -> None:
        """Says how many are made so far."""
        if time.monotonic() - self.said > 1:
            self.said = time.monotonic()
            self._write(rows)

    def _write(self, rows: int) -> None:
        # Storage that fails for a moment must not stop what is counted.
        with contextlib.suppress(OSError):
            self.path.write_text(f"{rows} {who()}")


def tally_of(output: Path) -> Path:
    """Where it is."""
    return output.with_name(f".{output.name}.rows")


def counted(tally: Path) -> tuple[int, str] | None:
    """Rows that a tally counts, and who made them; None if there is no tally, or half of one."""
    try:
        rows, _, by = tally.read_text(encoding="utf-8").partition(" ")
        return int(rows or 0), by
    except (OSError, ValueError):
        return None
