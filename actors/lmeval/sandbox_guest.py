"""The other side of actors/lmeval/sandbox.py: a process that takes limits upon itself, runs one program and says how it ended.

    stdin    {"program", "seconds", "memory_mib", "file_kib"}
    stdout   "." when the program begins, then {"passed", "reason"}; the program's own output goes nowhere

Imports nothing of ours: Python runs it as a file, isolated.
"""

import contextlib
import json
import math
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
REFUSED = (
    *("socket.", "subprocess.", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill", "signal.pthread_kill"),
    *("pty.", "ctypes.", "sqlite3.", "os.symlink", "os.link", "os.chmod", "os.chown", "os.chflags", "os.setxattr", "os.removexattr"),
    *("resource.", "gc.get_", "os.fwalk", "os.chroot", "syslog."),
)
"""Beginnings of the audit events that never happen for a good reason in a solution of a small problem."""
CHANGING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.utime")
"""Audit events that change the files they name."""
NOT_AUDITED = ("mkfifo", "mknod", "fork", "forkpty", "posix_spawn", "posix_spawnp")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
READABLE = ("/dev/null", "/dev/urandom", "/usr/share/zoneinfo", "/etc/localtime")


def limit(seconds: float, memory_mib: int, file_kib: int) -> None:
    """Takes limits of the kernel upon this process, for good."""
    cpu = math.ceil(seconds)
    limits = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (memory_mib << 20,) * 2,
        resource.RLIMIT_FSIZE: (file_kib << 10,) * 2,
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
        # The kernel asks this of everybody but root, whom audit events keep from starting processes.
        resource.RLIMIT_NPROC: (0, 0),
    }
    for kind, (soft, hard) in limits.items():
        _, most = resource.getrlimit(kind)
        bounded = hard if most == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(kind, (min(soft, bounded), bounded))


def leave_the_network() -> None:
    """Moves to a network namespace of its own, in which there is nothing, where the kernel allows it."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)
    for name in [name for name in sys.modules if "ctypes" in name]:
        del sys.modules[name]


def guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses what a solution has no business with: files elsewhere, sockets, other processes.

    Args:
        folder: where it may write.
    """
    home = os.path.realpath(folder)
    library = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *filter(None, sys.path))}
    # Taken now: the program could put others in their place.
    real, within, isdir, PathLike = os.path.realpath, os.path.commonpath, os.path.isdir, os.PathLike

    def inside(path: Any, roots: set[str]) -> bool:
        if isinstance(path, int):
            # Open already, and asked about then.
            return True
        place = real(os.fsdecode(path) if isinstance(path, bytes | PathLike) else str(path))
        return any(place == root or within((place, root)) == root for root in roots)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed here")
        if event == "import" and args[0] in ("ctypes", "_ctypes", "_posixsubprocess"):
            raise ImportError(f"{args[0]} is not allowed here")
        if event == "open":
            path, mode, flags = args
            writing = bool(flags & WRITING) if isinstance(flags, int) else any(sign in str(mode) for sign in "wax+")
            if not inside(path, {home} if writing and path != os.devnull else {home, *library, *READABLE}):
                raise PermissionError(f"{path} is outside of the folder of this program")
            # Names could be given relative to an open folder, which no event tells.
            if not isinstance(path, int) and isdir(path):
                raise PermissionError(f"{path} is a folder")
        if event in CHANGING and not all(inside(path, {home}) for path in args[: 2 if event == "os.rename" else 1]):
            raise PermissionError(f"{args[0]} is outside of the folder of this program")

    return hook


def refuse(*_: Any, **__: Any) -> None:
    """Stands in for what no audit event tells of."""
    raise PermissionError("not allowed here")


def attempt(program: str) -> tuple[bool, str]:
    """Runs the program; whether it came to its end, and what it raised if not."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    try:
        exec(compile(program, "<candidate>", "exec"), module.__dict__)
    except MemoryError:
        return False, "out of memory"
    except SystemExit:
        return False, "exited before its end"
    except BaseException as error:  # noqa: BLE001
        # Whatever a model's program raises is its failure, not ours.
        text = str(error).splitlines()
        return False, f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
    return True, "passed"


def main() -> None:
    """One program, from its job to its verdict."""
    job = json.loads(sys.stdin.buffer.read().decode("utf-8", "surrogatepass"))
    report, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    leave_the_network()
    import _posixsubprocess
    import posix

    for module, names in ((_posixsubprocess, ("fork_exec",)), (os, NOT_AUDITED), (posix, NOT_AUDITED)):
        for name in names:
            setattr(module, name, refuse)
    dump, write, leave = json.dumps, os.write, os._exit
    limit(job["seconds"], job["memory_mib"], job["file_kib"])
    sys.addaudithook(guard(os.path.curdir))
    write(report, b".")
    passed, reason = attempt(job["program"])
    write(report, dump({"passed": passed, "reason": reason}).encode())
    # Threads, exit handlers and destructors of the program do not get a turn.
    leave(0)


if __name__ == "__main__":
    main()
