"""What became of each stage of a run, out of its directory. Reads manifests alone: cheap enough for whoever only asks how far a run is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.run.manifests import present, read_json, read_manifest
from pipelines.run.plan import Planned

SKIPPED, DONE, RUNNING, STOPPED, WAITING, DAMAGED = "done before", "done", "running", "stopped", "to do", "damaged"


@dataclass(frozen=True)
class StageFacts:
    """A node of the job graph and what became of it."""

    name: str
    state: str
    seconds: float | None = None
    inputs: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    work_seconds: float | None = None
    """of `seconds`: tokens sampled or scored, steps taken; the rest is processes, weights and files"""

    @property
    def policy(self) -> str:
        """Who it is about: the first part of its name that says so."""
        return self.name[: -len(self.own) - 1].rpartition("/")[2] if "/" in self.name else self.name

    @property
    def own(self) -> str:
        """Its name without whom it is about."""
        return self.name.removeprefix("evaluation/policies/").removeprefix("evaluation/").partition("/")[2] or self.name


def planned(root: Path, stages: Sequence[Planned], ended: Mapping[str, Any] | None, under_way: str) -> Iterator[StageFacts]:
    """States of the stages of a job graph.

    Args:
        root: the run directory.
        stages: the graph, in order.
        ended: summary of a run that has ended.
        under_way: what a stage that began and has not ended is called: running, or stopped.
    """
    for stage in stages:
        folder = root / stage.name
        manifest, started = read_manifest(folder / "manifest.json") or {}, read_json(folder / "started.json") or {}
        if manifest.get("fingerprint") == stage.fingerprint:
            state, numbers, settings = _state(stage.name, ended), manifest["numbers"], manifest["settings"]
            yield StageFacts(stage.name, state, manifest["seconds"], stage.inputs, numbers, settings, manifest.get("work_seconds"))
        else:
            waiting = DAMAGED if not manifest and (folder / "manifest.json").exists() else WAITING
            state = under_way if started.get("fingerprint") == stage.fingerprint else waiting
            yield StageFacts(stage.name, state, None, stage.inputs)


def found(root: Path, ended: Mapping[str, Any] | None) -> Iterator[StageFacts]:
    """The stages that left a manifest of what is there now, each behind what it read: all that is known of a run without its job graph.

    Args:
        root: the run directory.
        ended: summary of a run that has ended.
    """
    for m in present(root):
        inputs = tuple(dict.fromkeys(given["name"] for given in m["inputs"].values()))
        yield StageFacts(m["name"], _state(m["name"], ended), m["seconds"], inputs, m["numbers"], m["settings"], m.get("work_seconds"))


def _state(name: str, ended: Mapping[str, Any] | None) -> str:
    log = (ended or {}).get("stages", [])
    return SKIPPED if any(entry["name"] == name and entry["skipped"] for entry in log) else DONE
