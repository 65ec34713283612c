"""Programs that a model wrote, each run in a process of its own: little time and memory, an empty folder to write in, no network.

What holds them: limits of the kernel (CPU time, memory, size and number of files, processes), a network namespace without a network
where the kernel gives one, and Python's audit events, which refuse files elsewhere, sockets and other processes. The last is no
wall against a program made to break it: on a machine that holds more than the evaluation, run that in a container.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

GUEST = Path(__file__).with_name("sandbox_guest.py")
START = 60.0
"""Seconds that Python may take to begin, before any time of the program counts."""
SAID = 4096
"""Bytes that are heard from a process at most."""


@dataclass(frozen=True)
class Limits:
    """What a program may take."""

    seconds: float = 5.0
    """CPU time; the clock on the wall may show four times as much, so that a busy machine fails nobody"""
    memory_mib: int = 1024
    """address space"""
    file_kib: int = 1024
    """size of each file"""


@dataclass(frozen=True)
class Verdict:
    """How a program ended."""

    passed: bool
    """it ran to its end and raised nothing"""
    reason: str
    """"passed", or why not"""


def run(program: str, limits: Limits | None = None) -> Verdict:
    """Runs a program to its end or its limits.

    Args:
        program: Python source, tests included; it passes if it comes to its end. One that exits before does not, whatever its status.
        limits: of this program.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="candidate-", ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as job:
        job.write(json.dumps({"program": program, **vars(limits)}).encode("utf-8", "surrogatepass"))
        job.seek(0)
        guest = subprocess.Popen(
            [sys.executable, "-I", "-B", str(GUEST)],
            stdin=job,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        assert guest.stdout
        try:
            began = _hear(guest.stdout.fileno(), 1, START) == b"."
            heard = _hear(guest.stdout.fileno(), SAID, limits.seconds * 4) if began else b""
        finally:
            # Its whole session, whatever it started; it is gone already if it ended by itself.
            status = _end(guest)
            guest.stdout.close()
    return _verdict(began, heard, status)


def _hear(pipe: int, most: int, seconds: float) -> bytes:
    """What comes out of a pipe until it closes, `most` bytes are there or the time is over."""
    heard, poll, deadline = b"", select.poll(), time.monotonic() + seconds
    poll.register(pipe, select.POLLIN)
    while len(heard) < most and (left := deadline - time.monotonic()) > 0:
        if poll.poll(left * 1000):
            chunk = os.read(pipe, most - len(heard))
            if not chunk:
                break
            heard += chunk
    return heard


def _end(guest: "subprocess.Popen[bytes]") -> int | None:
    """Ends a process and what it left behind; its exit status if it had ended by itself, or None."""
    try:
        status: int | None = guest.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        status = None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(guest.pid, signal.SIGKILL)
    guest.wait()
    return status


def _verdict(began: bool, heard: bytes, status: int | None) -> Verdict:
    if not began:
        raise RuntimeError(f"the process for a program did not begin (exit status {status}): {GUEST} with {sys.executable}")
    try:
        said = json.loads(heard)
        return Verdict(said["passed"] is True, str(said["reason"])[:300])
    except (ValueError, TypeError, KeyError):
        pass
    if status is None or status in (-signal.SIGXCPU, -signal.SIGKILL):
        return Verdict(False, "timed out")
    return Verdict(False, f"ended by signal {-status}" if status < 0 else "exited before its end")


class CodeEval:
    """Stands in for the metric `code_eval` of Hugging Face's `evaluate`, which has to be fetched and runs programs unguarded."""

    def __init__(self) -> None:
        self.limits = Limits()
        self.reasons: dict[tuple[str, str], str] = {}
        """how every (program, tests) ended"""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[Verdict]]]:
        """Runs programs against tests.

        Args:
            references: tests of each problem.
            predictions: programs for each problem.
            k: of pass@k.

        Returns:
            {"pass@k": unbiased estimate (Chen et al. 2021, equation 1), mean over problems}; verdicts by problem.
        """
        verdicts = {
            number: [self._one(candidate, tests) for candidate in candidates]
            for number, (tests, candidates) in enumerate(zip(references, predictions, strict=True))
        }
        counts = [(len(found), sum(v.passed for v in found)) for found in verdicts.values()]
        usable = [each for each in k if all(n >= each for n, _ in counts)]
        return {f"pass@{each}": sum(1 - comb(n - c, each) / comb(n, each) for n, c in counts) / len(counts) for each in usable}, verdicts

    def _one(self, candidate: str, tests: str) -> Verdict:
        verdict = run(f"{candidate}\n{tests}", self.limits)
        self.reasons[candidate, tests] = verdict.reason
        return verdict
