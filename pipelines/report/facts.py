"""What is known of a run, out of its directory: nothing is computed here that is not on disk, so every number can be traced to its rows.

runs/NAME/**/manifest.json, metrics.jsonl, *.parquet --> `Facts`, while the run is going on or afterwards
"""

import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.run.artifacts import Stage
from pipelines.run.manifests import read_json
from pipelines.run.plan import Planned
from pipelines.watching import states
from pipelines.watching.states import DAMAGED, DONE, RUNNING, SKIPPED, STOPPED, WAITING, StageFacts

EVALUATED = "evaluation/policies/"


@dataclass(frozen=True)
class Lengths:
    """Sampled responses of a stage."""

    tokens: tuple[int, ...]
    finish: Mapping[str, int]
    """finish reason -> responses"""

    @property
    def truncated(self) -> float:
        """Share that was cut."""
        return self.finish.get("length", 0) / max(1, sum(self.finish.values()))


@dataclass(frozen=True)
class Facts:
    """A run so far."""

    root: Path
    name: str
    config: str
    """the resolved config, YAML"""
    stages: tuple[StageFacts, ...]
    summary: Mapping[str, Any] | None
    """of a run that has ended"""
    versions: Mapping[str, str]
    curves: Mapping[str, Sequence[Mapping[str, float]]]
    """training stage -> its steps"""
    lengths: Mapping[str, Lengths]
    """sampling stage -> its responses"""
    best_of_n: Mapping[str, Any] | None
    failure: str | None = None
    """why it stopped before its end"""
    prefix: str = ""
    """of the names of the job's own files"""

    @property
    def done(self) -> list[StageFacts]:
        """The stages whose data is there."""
        return [stage for stage in self.stages if stage.state in (DONE, SKIPPED)]

    @property
    def title(self) -> str:
        """The run, and which job it is about where others share its directory."""
        return f"{self.name}: {self.prefix.rstrip('-')}" if self.prefix else self.name

    def evaluations(self) -> dict[str, Mapping[str, Any]]:
        """Accuracy of every policy that has one so far."""
        found = {s.policy: s.numbers for s in self.stages if s.name.endswith("/evaluation") and s.numbers}
        return {name: numbers for name, numbers in found.items() if numbers.get("accuracy") is not None}

    def data(self) -> dict[str, Mapping[str, Any]]:
        """What was read and set aside, by the stage that read it."""
        return {s.name: s.numbers for s in self.stages if "rejected" in s.numbers and not s.name.startswith(EVALUATED)}

    def prompts(self) -> dict[str, Mapping[str, Any]]:
        """The same of an evaluation: nothing is held out, all rows are prompts."""
        found = {s.name: s.numbers for s in self.stages if "rejected" in s.numbers and s.name.startswith(EVALUATED)}
        return {
            stage: {"prompts" if key == "train" else key: value for key, value in numbers.items() if key != "held_out"}
            for stage, numbers in found.items()
        }

    def trained(self) -> dict[str, Mapping[str, Any]]:
        """Numbers of the trainings on pairs that are done, by policy."""
        return {s.policy: s.numbers for s in self.stages if s.name.endswith("/training") and "tail_reward_real" in s.numbers}

    def scoreboard(self) -> dict[str, Any]:
        """What the evaluation has found so far, as `pipelines.report.scoreboard` takes it."""
        found: dict[str, Any] = {"measures": {}, "tasks": {}}
        for stage in self.stages:
            if stage.numbers and stage.name.startswith(EVALUATED):
                if stage.own == "measures":
                    found["measures"][stage.policy] = stage.numbers
                elif stage.own.startswith("tasks/"):
                    found["tasks"].setdefault(stage.policy, {})[stage.own.removeprefix("tasks/")] = stage.numbers
        return found | {"tournament": self.stage("evaluation/tournament/games"), "mt_bench": self.stage("evaluation/mt_bench/grades")}

    def stage(self, name: str) -> Mapping[str, Any]:
        """Numbers of a stage; nothing where it is not done."""
        return next((s.numbers for s in self.stages if s.name == name), {})

    def settings(self, name: str) -> Mapping[str, Any]:
        """Settings of a stage; nothing where it is not done."""
        return next((s.settings for s in self.stages if s.name == name), {})


def gather(
    root: Path, stages: Sequence[Stage] = (), prefix: str = "", failure: str | None = None, log: Sequence[Mapping[str, Any]] = ()
) -> Facts:
    """Reads a run directory.

    Args:
        root: the directory.
        stages: the job graph in its order; without it the stages that left a manifest, by the time when they ended.
        prefix: of the names of the job's own files ("reward-" where it shares the directory).
        failure: why the job stopped, if it did.
        log: of the stages of a run that has not ended, as the summary will have it.
    """
    ended = read_json(root / f"{prefix}summary.json")
    told = ended or {"stages": log}
    graph = [Planned.of(stage) for stage in stages]
    known = list(states.planned(root, graph, told, STOPPED if failure else RUNNING) if graph else states.found(root, told))
    done = [stage for stage in known if stage.state in (DONE, SKIPPED)]
    manifests = [read_json(root / stage.name / "manifest.json") or {} for stage in done]
    file = root / f"{prefix}config.yaml"
    return Facts(
        root=root,
        name=root.name,
        config=file.read_text(encoding="utf-8") if file.exists() else "",
        stages=tuple(known),
        summary=ended,
        versions=manifests[-1].get("versions", {}) if manifests else {},
        curves={s.name: steps for s in known if s.state not in (WAITING, DAMAGED) and (steps := _steps(root / s.name / "metrics.jsonl"))},
        lengths={s.name: _lengths(root / s.name, m["fingerprint"]) for s, m in zip(done, manifests, strict=True) if _samples(s)},
        best_of_n=next((read_json(root / s.name / "report.json") for s in done if (root / s.name / "report.json").exists()), None),
        failure=failure,
        prefix=prefix,
    )


def _steps(path: Path) -> list[dict[str, float]]:
    """Metrics of a training's steps, as far as it has come: the last line of one that is going on may be half written."""
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            steps.append(json.loads(line))
        except ValueError:
            break
    return steps


def _samples(stage: StageFacts) -> bool:
    return "sampling" in stage.settings


@functools.lru_cache(maxsize=64)
def _lengths(folder: Path, fingerprint: str) -> Lengths:
    """Read once for a stage that is done: the report is written again after every stage."""
    tokens: list[int] = []
    finish: Counter[str] = Counter()
    for path in sorted(folder.glob("*/*.parquet")):
        table = pq.read_table(path, columns=["response_ids", "finish_reason"])
        tokens += pc.list_value_length(table["response_ids"]).to_pylist()
        finish.update(table["finish_reason"].to_pylist())
    return Lengths(tuple(tokens), dict(finish))
