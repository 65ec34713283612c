"""Local files in place of a task's data set on the hub: which file is which split, and raw layouts turned into the hub's.

tasks.data = {arc_challenge: data/arc}   ARC-Challenge-Dev.jsonl, ARC-Challenge-Test.jsonl (as AI2 publishes them)
    --> evaluated "test", shots from "validation", rows as on the hub
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data import sources
from pipelines.lmeval.catalogue import Leaf
from pipelines.run.artifacts import StageError

Row = dict[str, Any]
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
    "dev": ("dev", "validation"),
}
"""What a split is called in names of files and folders."""


@dataclass(frozen=True)
class Local:
    """Files of a task."""

    evaluated: str
    """split whose rows are asked"""
    shots_from: str | None
    """split that the examples come from; None where none are wanted, or the task has its own"""
    files: Mapping[str, tuple[str, ...]]
    """of both splits"""

    @property
    def borrowed(self) -> bool:
        """Whether examples are other rows of the evaluated split."""
        return self.shots_from == self.evaluated

    def identity(self) -> dict[str, Any]:
        """What determines the rows, for a fingerprint: the content of every file."""
        return {split: sources.identity(list(files), None, split) for split, files in self.files.items()}


def locate(leaf: Leaf, data: Mapping[str, str], shots: int) -> Local | None:
    """Finds the files of a task.

    Args:
        leaf: the task.
        data: paths by task or group.
        shots: how many examples are wanted.

    Returns:
        None if its data comes from the hub.

    Raises:
        StageError: a path is not there, or none of its files is the split that is evaluated.
    """
    name = next((name for name in (leaf.name, *reversed(leaf.via)) if name in data), None)
    if name is None:
        return None
    key, config = f"tasks.data.{name}", leaf.config
    files = _files(data[name], config.get("dataset_name"), of_group=name != leaf.name, key=key)
    evaluated = str(config.get("test_split") or config.get("validation_split"))
    found = {split: _named(files, split) for split in filter(None, _splits(config))}
    if not any(found.values()) and len(files) == 1:
        found = {evaluated: tuple(files)}
    if not found.get(evaluated):
        names = ", ".join(Path(file).name for file in files[:9])
        raise StageError(f"{key}={data[name]!r}: no file or folder is called {evaluated!r}, the split of {leaf.name}, among {names}")
    own = (config.get("fewshot_config") or {}).get("samples") is not None and not config.get("fewshot_split")
    shots_from = None if own or not shots else next(split for split in (*_splits(config), evaluated) if found.get(split))
    return Local(evaluated, shots_from, {split: found[split] for split in dict.fromkeys((evaluated, shots_from)) if split})


def _splits(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """The splits of a task, those for examples first."""
    return tuple(config.get(key) for key in ("fewshot_split", "training_split", "validation_split", "test_split"))


def _files(path: str, subset: str | None, of_group: bool, key: str) -> list[str]:
    """The files of a path, or of the folder of a subset in it."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise StageError(f"{key}={path!r}: there is no such file or directory (in {Path.cwd()})")
    if subset and (folder / subset).is_dir():
        folder = folder / subset
    found = sources.find(str(folder), "", key=key)
    if subset and of_group and Path(path).is_dir() and folder.name != subset:
        found = [file for file in found if subset in Path(file).name]
        if not found:
            raise StageError(f"{key}={path!r}: no file or folder is called {subset!r}, a subset of this group")
    return found


def _named(files: Iterable[str], split: str) -> tuple[str, ...]:
    """The files called like a split, or in a folder that is; its own name goes before other words for it."""
    names = {file: Path(file) for file in files}
    for word in dict.fromkeys((split.lower(), *WORDS.get(split, ()))):
        whole = re.compile(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])")
        for part in (lambda path: path.name, lambda path: path.parent.name):
            chosen = tuple(file for file, path in names.items() if whole.search(part(path).lower()))
            if chosen:
                return chosen
    return ()


def read(task: str, local: Local) -> dict[str, list[Row]]:
    """Rows of each split, in the hub's layout.

    Raises:
        StageError: a row cannot be read, or there is none.
    """
    convert = LAYOUTS.get(task, same)
    splits: dict[str, list[Row]] = {}
    for split, files in local.files.items():
        rows = []
        for file in files:
            for raw in sources.read(file):
                if raw["reason"]:
                    raise StageError(f"{file}: row {raw['source'].rpartition(':')[2]} of task {task}: {raw['reason']}")
                rows.append(_converted(convert, json.loads(raw["row"]), raw["source"], task))
        splits[split] = [row for row in rows if row is not None]
        if not splits[split]:
            raise StageError(f"task {task}: {', '.join(files)} holds no row of the split {split!r}")
    return splits


def _converted(convert: Callable[[Row], Row | None], row: Row, source: str, task: str) -> Row | None:
    try:
        return convert(row)
    except (KeyError, TypeError) as error:
        raise StageError(f"{source}: the row does not look like {task}: it has {', '.join(row)}, and no {error}") from None


def same(row: Row) -> Row:
    """A row that is as on the hub already."""
    return row


def arc(row: Row) -> Row:
    """AI2's {"question": {"stem", "choices": [{"text", "label"}]}} as {"question", "choices": {"text": [], "label": []}}."""
    question = row["question"]
    if not isinstance(question, dict):
        return row
    choices = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
    return {"id": row["id"], "question": question["stem"], "choices": choices, "answerKey": row["answerKey"]}


def winogrande(row: Row) -> Row:
    """The columns that the hub has."""
    return {key: str(row[key]) for key in ("sentence", "option1", "option2", "answer")}


def mbpp(row: Row) -> Row | None:
    """Its one file holds all splits: problems 11 to 510 are tested (Austin et al. 2021)."""
    return row if 11 <= int(row["task_id"]) <= 510 else None


LAYOUTS: dict[str, Callable[[Row], Row | None]] = {"arc_challenge": arc, "arc_easy": arc, "winogrande": winogrande, "mbpp": mbpp}
