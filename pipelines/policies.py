"""The policies of a run, found from its files."""

import logging
from pathlib import Path
from typing import Any

import yaml

from pipelines.artifacts import StageError
from pipelines.manifests import present
from pipelines.settings import Model

log = logging.getLogger(__name__)

CONFIGS = ("config.yaml", "reward-config.yaml")


def of_run(root: Path) -> dict[str, Model]:
    """The base model and every policy that was trained from it, in the order in which they came to be.

    Args:
        root: the run directory.

    Raises:
        StageError: it is none.
    """
    config = next((root / name for name in CONFIGS if (root / name).is_file()), None)
    if config is None:
        raise StageError(f"{root} is no run directory: it has no {' or '.join(CONFIGS)}")
    base = Model(**_section(config, "model"))
    found = {"base": base}
    manifests = present(root, "*/*/manifest.json")
    for path in root.glob("*/training/manifest.json"):
        if not any(root / manifest["name"] == path.parent for manifest in manifests):
            log.warning("%s was made from what the run has replaced since: it is none of its policies", path.parent)
    for manifest in manifests:
        folder = root / manifest["name"] / "policy"
        if manifest["name"].endswith("/training") and folder.is_dir():
            found[manifest["name"].partition("/")[0]] = Model(path=str(folder), trust_remote_code=base.trust_remote_code)
    return found


def demonstrations(root: Path) -> dict[str, Any] | None:
    """The settings with which the run's held-out demonstrations are read again, none of them longer than allowed; None if there are
    none."""
    folder = root / "demonstrations" / "held_out"
    if not any(folder.glob("*.parquet")):
        return None
    config = next((found for name in CONFIGS if (root / name).is_file() and (found := _section(root / name, "demonstrations"))), {})
    given = {name: config[name] for name in ("max_prompt_tokens", "max_tokens") if name in config}
    return given | {"path": str(folder), "layout": "prompt_completion", "columns": {"completion": "response"}}


def _section(file: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8")).get(name) or {}
