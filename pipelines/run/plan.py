"""plan.json: the job graph of a run, written once when the job starts, so that whoever looks at the files knows what is still to do.

runs/NAME/plan.json, reward-plan.json, evaluation-plan.json     {"script", "run", "pid", "host", "started", "stages": [...]}
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.run.artifacts import Stage, read_json, write_json

FILE = "plan.json"
DRAWS = ("seed", "iteration")
"""Settings that say which numbers are drawn, not how much work it is."""


@dataclass(frozen=True)
class Planned:
    """A stage of the job graph as its files know it."""

    name: str
    fingerprint: str
    inputs: tuple[str, ...]
    """names of the stages that it reads, each once"""
    demand: str
    kind: str
    """the same for stages that do the same work with the same settings: what one took, the next will take, about"""

    @classmethod
    def of(cls, stage: Stage) -> "Planned":
        """From the job graph."""
        inputs = tuple(dict.fromkeys(found.name for found in stage.inputs.values()))
        return cls(stage.name, stage.fingerprint, inputs, stage.demand, _kind(stage))


@dataclass(frozen=True)
class Plan:
    """What a job set out to do."""

    script: str
    """jobs/gsil_iterative.py"""
    pid: int
    host: str
    started: float
    """Unix seconds"""
    stages: tuple[Planned, ...]
    """in the order in which they run"""
    prefix: str = ""
    """of the job's files: jobs that share a run directory have names of their own"""


def write_plan(root: Path, prefix: str, script: str, stages: Sequence[Stage]) -> None:
    """Writes the plan of a job that this process starts now."""
    who = {"script": script, "pid": os.getpid(), "host": os.uname().nodename, "started": time.time()}
    write_json(root / f"{prefix}{FILE}", who | {"stages": [asdict(Planned.of(stage)) for stage in stages]})


def read_plans(root: Path) -> list[Plan]:
    """Plans of all jobs that worked in a run directory, in the order in which they started."""
    found = []
    for path in root.glob(f"*{FILE}"):
        content = read_json(path)
        if content and "stages" in content:
            stages = tuple(Planned(**{**stage, "inputs": tuple(stage["inputs"])}) for stage in content.pop("stages"))
            found.append(Plan(**content, stages=stages, prefix=path.name.removesuffix(FILE)))
    return sorted(found, key=lambda plan: plan.started)


def _kind(stage: Stage) -> str:
    own = re.sub(r"\d+", "N", stage.name.rpartition("/")[2])
    parts = [own, stage.version, _undrawn(stage.settings), sorted(stage.inputs)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _undrawn(settings: Any) -> Any:
    if isinstance(settings, Mapping):
        return {key: _undrawn(value) for key, value in settings.items() if key not in DRAWS}
    return settings
