"""Which tasks lm-eval has, read from its YAML files alone: the driver imports neither lm-eval nor what it imports.

find("mmlu")  -->  Task("mmlu", leaves: mmlu_abstract_algebra (its file, what groups change in it, version, shots), ...)
"""

import difflib
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from pipelines.run.artifacts import StageError

PRESETS = {
    "gsil": ("arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu", "humaneval"),
    "dil": ("leaderboard_mmlu_pro", "leaderboard_bbh", "leaderboard_musr", "leaderboard_math_hard", "gsm8k", "arc_challenge"),
}
"""What the papers report: Open LLM Leaderboard 1 and HumanEval; leaderboard 2 "by its default setting" with GSM8K and ARC of leaderboard 1
(DIL, appendix on evaluation)."""
ALIASES = {"truthfulqa": "truthfulqa_mc2", "musr": "leaderboard_musr", "math": "leaderboard_math_hard"}
SHOTS = {"gsm8k": 5, "arc_challenge": 25, "hellaswag": 10, "winogrande": 5, "mmlu": 5, "truthfulqa_mc1": 0, "truthfulqa_mc2": 0}
"""The papers'. lm-eval's own defaults stand for other tasks."""
MAIN = {"gsm8k": "exact_match,strict-match", "winogrande": "acc", "truthfulqa_mc2": "acc", "mmlu": "acc"}
"""The metric that the papers report."""
FIRST = ("acc_norm", "exact_match", "acc", "pass@1", "pass_at_1")
"""The metric of other tasks: the first of these that there is."""
INSTALL = "uv pip install -e '.[eval]'"
NAME = re.compile(r"^[\"']?(?:task|group)[\"']?:[ \t]*[\"']?([\w.:+-]+)[\"']?[ \t]*$", re.MULTILINE)
TAG = re.compile(r"^[\"']?tag[\"']?:[ \t]*(?:[\"']?([\w.:+-]+)[\"']?[ \t]*$|((?:\n[ \t]*-[ \t]*[\"']?[\w.:+-]+[\"']?)+))", re.MULTILINE)


@dataclass(frozen=True)
class Leaf:
    """A task that is no group."""

    name: str
    file: str
    """its YAML file"""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """keys that groups put in place of its own"""
    via: tuple[str, ...] = ()
    """the groups it was found in, the outermost first"""

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Its keys; functions are texts that begin with !function."""
        return _load(Path(self.file)) | dict(self.changes)

    @property
    def version(self) -> Any:
        """That its authors give it."""
        about = self.config.get("metadata")
        return about.get("version") if isinstance(about, dict) else None

    @property
    def runs_code(self) -> bool:
        """Whether answers are programs that are run."""
        return bool(self.config.get("unsafe_code"))


@dataclass(frozen=True)
class Task:
    """A task or group that a person names."""

    name: str
    leaves: tuple[Leaf, ...]
    group: bool
    weighted: bool = True
    """of a group: whether its metrics are means over rows, else over leaves"""

    def shots(self, leaf: Leaf, asked: Mapping[str, int]) -> int:
        """Examples before a question of a leaf: the asked ones of the leaf or a group around it, or the papers', or lm-eval's."""
        for given in (asked, SHOTS):
            for name in (leaf.name, *reversed(leaf.via)):
                if name in given:
                    return given[name]
        return int(leaf.config.get("num_fewshot") or 0)


def version() -> str:
    """lm-eval's.

    Raises:
        StageError: it is not installed.
    """
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise StageError(f"tasks need lm-eval, which is not installed: {INSTALL}") from None


def expand(names: list[str]) -> list[str]:
    """Presets and short names replaced by lm-eval's, in order, none twice."""
    return list(dict.fromkeys(ALIASES.get(each, each) for name in names for each in PRESETS.get(name, (name,))))


def find(name: str, key: str = "tasks.names") -> Task:
    """The task or group of a name.

    Args:
        name: of a task or group of lm-eval, or a short name.
        key: the setting that says it, for errors.

    Raises:
        StageError: lm-eval is not installed, or has no such task; with the nearest names.
    """
    version()
    if _home(ALIASES.get(name, name)) is None:
        near = difflib.get_close_matches(name, [*everything(), *PRESETS, *ALIASES], n=3, cutoff=0.4)
        raise StageError(f"{key}: lm-eval {version()} has no task {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return _found(ALIASES.get(name, name))


@functools.cache
def _found(name: str) -> Task:
    home = _home(name)
    assert home
    entries, tags = _table(home)
    listed = entries[name][1] if name in entries else {}
    weights = [each.get("weight_by_size", True) for each in _listed(listed.get("aggregate_metric_list")) if isinstance(each, dict)]
    return Task(name, tuple(_once(_leaves(name, {}, ()))), group=name in tags or "group" in listed, weighted=all(weights))


def main_metric(task: str, metrics: Mapping[str, Any]) -> str | None:
    """Which of the metrics of a task the papers report."""
    chosen = MAIN.get(task)
    if chosen in metrics:
        return chosen
    ordered = [key for first in FIRST for key in metrics if key.split(",")[0] == first]
    return next(iter([*ordered, *metrics]), None)


def _once(leaves: Iterator[Leaf]) -> Iterator[Leaf]:
    seen: set[str] = set()
    for leaf in leaves:
        if leaf.name not in seen:
            seen.add(leaf.name)
            yield leaf


def _leaves(name: str, changes: Mapping[str, Any], via: tuple[str, ...]) -> Iterator[Leaf]:
    """The tasks behind a name, as lm-eval's own loader finds them."""
    home = _home(name)
    if home is None:
        raise StageError(f"lm-eval {version()} has no task {name!r}, which its group {via[-1]!r} names")
    entries, tags = _table(home)
    if name not in entries:
        for each in sorted(tags[name]):
            yield from _leaves(each, changes, (*via, name))
        return
    file, config = entries[name]
    if "group" not in config:
        yield Leaf(name, str(file), changes, via)
        return
    yield from _members(config, changes, (*via, name))


def _members(group: Mapping[str, Any], changes: Mapping[str, Any], via: tuple[str, ...]) -> Iterator[Leaf]:
    for member in _listed(group.get("task")):
        if isinstance(member, str):
            yield from _leaves(member, changes, via)
            continue
        own = {key: value for key, value in member.items() if key not in ("task", "group", "group_alias", "aggregate_metric_list")}
        inner = member.get("task")
        if isinstance(inner, list):
            yield from _members(member, {**changes, **own}, (*via, str(member.get("group"))))
        else:
            yield from _leaves(str(inner or member["group"]), {**changes, **own}, via)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def root() -> Path:
    """Folder of lm-eval's tasks."""
    version()
    spec = importlib.util.find_spec("lm_eval")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tasks"


def _home(name: str) -> str | None:
    """The folder of lm-eval's tasks that has a name. Most are called like their tasks, which saves looking into thousands of files."""
    likely = sorted((path.name for path in root().iterdir() if path.is_dir() and f"{name}_".startswith(f"{path.name}_")), key=len)
    for folder in reversed(likely):
        entries, tags = _table(folder)
        if name in entries or name in tags:
            return folder
    return everything().get(name)


@functools.cache
def everything() -> dict[str, str]:
    """The folder of every task, group and tag."""
    found: dict[str, str] = {}
    top = root()
    # Templates that others include have no suffix, and may hold the tag.
    for path in sorted([*top.rglob("*.yaml"), *top.rglob("*_yaml")], key=lambda path: path.as_posix()):
        text = path.read_text(encoding="utf-8", errors="replace")
        tags = [word for one, many in TAG.findall(text) for word in ([one] if one else re.findall(r"-[ \t]*[\"']?([\w.:+-]+)", many))]
        for name in [*NAME.findall(text), *tags]:
            found.setdefault(name, path.relative_to(top).parts[0])
    return found


Entries = dict[str, tuple[Path, dict[str, Any]]]


@functools.cache
def _table(folder: str) -> tuple[Entries, dict[str, set[str]]]:
    """Tasks and groups of a folder with their files and keys, and its tags with their tasks; of two of one name the first counts."""
    entries: Entries = {}
    tags: dict[str, set[str]] = {}
    for path in sorted((root() / folder).rglob("*.yaml"), key=lambda path: path.as_posix()):
        config = _load(path)
        name = config.get("group") or config.get("task")
        if not isinstance(name, str) or name in entries:
            continue
        entries[name] = (path, config)
        for tag in _listed(config.get("tag")) if "group" not in config else []:
            tags.setdefault(tag, set()).add(name)
    return entries, tags


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML with lm-eval's !function left as text."""


_Loader.add_constructor("!function", lambda loader, node: f"!function {node.value}")


@functools.cache
def _load(path: Path) -> dict[str, Any]:
    """The keys of a file over those of the files that it includes; {} for what is no task."""
    try:
        content = yaml.load(path.read_bytes(), Loader=_Loader)
    except (OSError, yaml.YAMLError):
        return {}
    if not isinstance(content, dict):
        return {}
    merged: dict[str, Any] = {}
    for included in _listed(content.get("include")):
        merged |= _load((path.parent / included).resolve())
    return merged | {key: value for key, value in content.items() if key != "include"}
