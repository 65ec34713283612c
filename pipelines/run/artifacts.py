"""Stages, fingerprints, manifests: what makes a run resume, and where every number comes from.

A stage is a function from (inputs, its own settings) to a directory of the run with data and a `manifest.json`, which is written
last and atomically. A manifest with the stage's fingerprint means done. A fingerprint covers the settings that determine the
result, the version of the stage's code and the fingerprints of its inputs, so it is known before anything ran.

    runs/NAME/iteration-1/negatives/
        started.json     fingerprint of the attempt under way: files of another attempt are thrown away, those of this one kept
        ...              the data
        manifest.json    fingerprint, settings, inputs, row counts, versions, wall time, sizes and checksums of the files

A fingerprint says what was asked for, `content` says what came out: a checksum over the data. A stage whose data was damaged is made
anew under the same fingerprint. What was made from it stays if the same came out again, and is made anew too if something else did (a
GPU's sums depend on the batch): else rows on disk would no longer be what its numbers were computed from. Sizes are looked at whenever
a manifest is read; checksums cost a reading of the data, and are compared once a process, for data that a stage to do will read.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from actors.notices import heard
from actors.storage import NO_ROOM, WriteError, advice, checksums, damage
from pipelines.run.keeping import Keeper
from pipelines.run.manifests import content_of, read_json, read_manifest, same_content, versions, write_json, write_manifest

log = logging.getLogger(__name__)
ATTEMPT = "checkpoints"
"""Folder of a stage that serves the attempt under way: no part of the artifact, and gone when the stage is done."""
LEFT_OVER = (".*.tmp", ".*.rows")
"""Files of writers that were killed."""
SAID_BYTES = 4e9
"""What is read before anything runs is said from here on."""


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
"""Makes the data of stages; returns numbers for the manifest of each, by stage name. `share` says how the wall time divides, `work` how
many seconds of it were what the stage is there for: the rest is processes that start and end."""


class Display:
    """Who is told how a run goes. This one says nothing."""

    def started(self, stages: tuple[Stage, ...]) -> None:
        """`stages` begin."""

    def follow(self, total: int | None, unit: str, done: Callable[[], int], also: Callable[[], Mapping[str, float]] = dict) -> None:
        """The stages that began have `total` units of work (None: nobody knows yet); `done` tells, whenever asked, how many are done, and
        `also` other numbers of the moment by name."""

    def finished(self, stage: Stage, seconds: float, skipped: bool, numbers: Mapping[str, Any]) -> None:
        """A stage is done, or was done before, with these numbers in its manifest."""

    def say(self, text: str) -> None:
        """A line for a person."""


class Run:
    """A run directory, held by one process.

    Args:
        root: the directory.
        display: is told what happens.
        begin: called before anything of the run is thrown away: before a stage begins, and when its data was found damaged.
        report: called whenever stages have begun or ended.
        patience: seconds that a stage waits for nodes which the cluster does not have yet.
    """

    def __init__(
        self,
        root: Path,
        display: Display | None = None,
        begin: Callable[[], None] = lambda: None,
        report: Callable[[], None] = lambda: None,
        patience: float = 3600.0,
    ):
        self.root = root
        self.keeper = Keeper()
        """of gangs and pools that outlive a stage"""
        self.display = display or Display()
        self.begin = begin
        self.report = report
        self.patience = patience
        self.log: list[dict[str, Any]] = []
        self.intact: set[str] = set()
        """stages whose data this process wrote, or compared with its checksums"""

    @property
    def notices(self) -> Path:
        """Folder for what happens to workers, see `actors.notices`."""
        return self.root / "logs" / "notices"

    def directory(self, stage: Stage) -> Path:
        """Where a stage's data lies."""
        return self.root / stage.name

    def manifest(self, stage: Stage) -> dict[str, Any] | None:
        """The manifest of a finished stage, or None if it has to run."""
        manifest = self._written(stage)
        if manifest is None or damage(self.directory(stage), manifest["files"]):
            return None
        return manifest if same_content(_read(manifest), self._contents(stage)) else None

    def verify(self, stages: Iterable[Stage]) -> None:
        """Looks whether the data that stages to do will read is what was written; a stage whose data is not is to do, too.

        Reads that data once. To be called before anything runs: what follows from damage then runs in the order of the job.
        """
        waiting = [stage for stage in stages if self.manifest(stage) is None]
        for stage in waiting:
            waiting += [source for source in stage.inputs.values() if self._found_damaged(source)]

    def require(self, stage: Stage) -> None:
        """Makes sure that a finished stage's data is what was written.

        Raises:
            StageError: it is not; the stage will be made anew.
        """
        if self._found_damaged(stage):
            raise StageError(f"{stage.name}: its data is damaged (logs/job.log says which file): the same command makes it anew")

    def _found_damaged(self, stage: Stage) -> bool:
        """Compares a finished stage's data with its checksums, once; if it was damaged the stage is not done any more."""
        manifest = self.manifest(stage)
        if manifest is None or stage.name in self.intact:
            return False
        directory, size = self.directory(stage), sum(manifest["files"].values())
        if size > SAID_BYTES:
            self.display.say(f"  {stage.name}: {size / 1e9:.1f} GB are compared with their checksums")
        try:
            why = damage(directory, manifest["files"], manifest.get("checksums"))
        except OSError as error:
            # What cannot be read now may be intact: nothing is thrown away.
            raise StageError(f"{stage.name}: {error}: see to the storage; the same command continues") from error
        if why is None:
            self.intact.add(stage.name)
            return False
        log.warning("%s: %s: the stage is made anew", stage.name, why)
        self.begin()
        # Not even an attempt: one that was killed behind its manifest would be taken up where it was.
        (directory / "started.json").unlink(missing_ok=True)
        (directory / "manifest.json").unlink()
        return True

    def _why_again(self, stage: Stage) -> str | None:
        """What became of a stage that was done."""
        path, manifest = self.directory(stage) / "manifest.json", self._written(stage)
        if manifest is None:
            return "manifest.json is damaged" if path.exists() and read_manifest(path) is None else None
        if why := damage(self.directory(stage), manifest["files"]):
            return why
        now = self._contents(stage)
        changed = [s.name for role, s in stage.inputs.items() if not same_content({role: _read(manifest).get(role)}, now)]
        return f"{changed[0]} has other content now than it was made from" if changed else None

    def _written(self, stage: Stage) -> dict[str, Any] | None:
        """The manifest of a stage with its fingerprint, whatever became of its data."""
        manifest = read_manifest(self.directory(stage) / "manifest.json")
        return manifest if manifest and manifest.get("fingerprint") == stage.fingerprint else None

    def _contents(self, stage: Stage) -> dict[str, str | None]:
        """What the data of a stage's inputs is now, by role; None where nobody knows."""
        return {role: (self._written(source) or {}).get("content") for role, source in stage.inputs.items()}

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
            for source in stage.inputs.values():
                self.require(source)
        try:
            with heard(self.notices):
                self._make(work, pending)
        except OSError as error:
            if not isinstance(error, WriteError) and error.errno not in NO_ROOM:
                raise
            told = error.strerror if isinstance(error, WriteError) else advice(Path(error.filename or self.root), error)
            raise StageError(f"{pending[0].name}: {told}") from error
        self.report()

    def _make(self, work: Work, pending: tuple[Stage, ...]) -> None:
        self.begin()
        for stage in pending:
            self._open(stage)
        self.display.started(pending)
        self.report()
        started = time.monotonic()
        numbers = work(self, pending)
        seconds = time.monotonic() - started
        for stage in pending:
            own = dict(numbers.get(stage.name, {}))
            own_seconds, work_seconds = seconds * own.pop("share", 1.0 / len(pending)), own.pop("work", None)
            self._finish(stage, own, own_seconds, work_seconds)
            self._record(stage, own_seconds, own, skipped=False)

    def _record(self, stage: Stage, seconds: float, numbers: Mapping[str, Any], skipped: bool) -> None:
        if all(entry["name"] != stage.name for entry in self.log):
            self.display.finished(stage, seconds, skipped, numbers)
            self.log.append({"name": stage.name, "seconds": round(seconds, 1), "skipped": skipped, "fingerprint": stage.fingerprint})

    def _open(self, stage: Stage) -> None:
        directory, contents = self.directory(stage), self._contents(stage)
        started = read_json(directory / "started.json") or {}
        finished = (directory / "manifest.json").exists()
        same = started.get("fingerprint") == stage.fingerprint and same_content(started.get("contents", {}), contents)
        if why := self._why_again(stage):
            log.warning("%s: %s: the stage is made anew", stage.name, why)
        if directory.exists() and (finished or not same):
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "started.json", {"fingerprint": stage.fingerprint, "contents": contents, "at": _now()})

    def _finish(self, stage: Stage, numbers: dict[str, Any], seconds: float, work_seconds: float | None) -> None:
        directory = self.directory(stage)
        started = directory / "started.json"
        for pattern in LEFT_OVER:
            for path in directory.rglob(pattern):
                path.unlink()
        made = [path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file() and path != started]
        files = {str(path): (directory / path).stat().st_size for path in made if path.parts[0] != ATTEMPT}
        if not files:
            raise StageError(f"{stage.name}: nothing is in {directory}: is run.root on storage that every node mounts?")
        sums, contents = checksums(directory, files), self._contents(stage)
        manifest = {
            "name": stage.name,
            "fingerprint": stage.fingerprint,
            "version": stage.version,
            "settings": dict(stage.settings),
            "inputs": {role: _came(source, contents[role]) for role, source in stage.inputs.items()},
            "numbers": numbers,
            "files": files,
            "checksums": sums,
            "content": content_of(sums),
            "seconds": round(seconds, 3),
            "work_seconds": None if work_seconds is None else round(work_seconds, 3),
            "finished": _now(),
            "versions": versions(),
        }
        write_manifest(directory / "manifest.json", manifest)
        self.intact.add(stage.name)
        # Last: a process that dies in between has finished the stage.
        started.unlink()
        # Of no use to anybody now, and 14 bytes a weight in bfloat16.
        shutil.rmtree(directory / ATTEMPT, ignore_errors=True)


def _came(source: Stage, content: str | None) -> dict[str, str]:
    """What a manifest says of an input."""
    said = {"name": source.name, "fingerprint": source.fingerprint}
    return said | {"content": content} if content else said


def _read(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    """What the content of a stage's inputs was, by role."""
    return {role: came.get("content") for role, came in manifest["inputs"].items()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
