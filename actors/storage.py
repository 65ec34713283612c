"""Files that are whole: written at once or not at all, with checksums that tell when one is no longer what was written.

Storage fails in three ways. An error that goes away is tried again; one that stays, a full disk first of all, is told with the path;
what was written and has changed since (cut off, a bit flipped) is found by its checksum before it is read as data.
"""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import xxhash

from actors.notices import tell

T = TypeVar("T")
PAUSES = (0.5, 3.0)
"""Seconds before the second and the third attempt."""
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
STAYS = NO_ROOM | {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOENT}
"""Errors that another attempt meets again."""
BLOCK = 4 << 20
READERS = 4
"""Files that are read at the same time."""
LITTLE = 64 << 20
"""Bytes: a file system with less left is full for a model's files."""


class WriteError(OSError):
    """A file that could not be written; `strerror` says which, why, and what to do."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it at the end: readers see the old file or the whole new one."""
    # Two nodes may write the same file at once, one of them given up for dead: no name is theirs both.
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            # Network storage tells here, and only here, that it was full.
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def patiently(what: str, action: Callable[[], T]) -> T:
    """Does something with storage, again after an error that may go away.

    Args:
        what: it does, for the log.
        action: does it whole or not at all.

    Raises:
        OSError: the last one.
    """
    for pause in PAUSES:
        try:
            return action()
        except OSError as error:
            if error.errno in STAYS:
                raise
            tell(f"{what}: {error.strerror or error}: tried again in {pause:g} s")
            time.sleep(pause)
    return action()


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, and tries again after an error that may go away.

    Raises:
        WriteError: it could not be written.
    """

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(data)

    try:
        patiently(f"writing {path}", write)
    except OSError as error:
        raise WriteError(error.errno, advice(path, error)) from error


def advice(path: Path, error: BaseException) -> str:
    """For a person: which path cannot be written, why, and what to do."""
    number = getattr(error, "errno", None)
    why = os.strerror(number) if number else (str(error).splitlines() or [type(error).__name__])[0]
    left = ""
    with contextlib.suppress(OSError):
        left = f" ({shutil.disk_usage(_there(path)).free / 2**20:.0f} MiB are left there)"
    mend = "free space or choose another place" if number in (errno.ENOSPC, errno.EDQUOT, None) else "see to the storage"
    return f"{path} cannot be written: {why}{left}: {mend}; the same command continues, nothing half-written is taken for done"


def is_full(path: Path, error: BaseException) -> bool:
    """Whether writing at `path` failed for want of room; libraries that write models do not always say so themselves."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    failed = isinstance(error, OSError) or "writing file" in str(error) or "I/O error" in str(error)
    return failed and shutil.disk_usage(_there(path)).free < LITTLE


def _there(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def checksum(path: Path) -> str:
    """XXH3-64 of a file, 16 hex digits: for accidents, no protection against malice."""

    def read() -> str:
        digest, block = xxhash.xxh3_64(), memoryview(bytearray(BLOCK))
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(block[:count])
        return digest.hexdigest()

    return patiently(f"reading {path}", read)


def checksums(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """`checksum` of files of a directory, by name."""
    asked = list(names)
    # Reading and hashing leave Python's lock to others.
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(asked, pool.map(lambda name: checksum(directory / name), asked), strict=True))


def damage(directory: Path, sizes: Mapping[str, int], sums: Mapping[str, str] | None = None) -> str | None:
    """What is wrong with files of a directory, as text for a person; None if they are what was written.

    Args:
        directory: theirs.
        sizes: in bytes, by name.
        sums: their `checksums`; None looks at the sizes alone.

    Raises:
        OSError: a file cannot be read, which says nothing about what is in it.
    """
    for name, size in sizes.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{name} is gone" if found is None else f"{name} is damaged: {found} bytes of {size}"
    if sums:
        now = checksums(directory, sums)
        for name, written in sums.items():
            if now[name] != written:
                return f"{name} is damaged: its checksum is {now[name]}, {written} was written"
    return None
