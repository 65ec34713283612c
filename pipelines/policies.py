"""The policies of a run, found from its files."""

from pathlib import Path

import yaml

from pipelines.artifacts import StageError
from pipelines.manifests import in_order, read_json
from pipelines.settings import Model

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
    base = Model(**(yaml.safe_load(config.read_text(encoding="utf-8")).get("model") or {}))
    found = {"base": base}
    manifests = [manifest for file in root.glob("*/*/manifest.json") if (manifest := read_json(file)) and "fingerprint" in manifest]
    for manifest in in_order(manifests):
        folder = root / manifest["name"] / "policy"
        if manifest["name"].endswith("/training") and folder.is_dir():
            found[manifest["name"].partition("/")[0]] = Model(path=str(folder), trust_remote_code=base.trust_remote_code)
    return found


def demonstrations(root: Path) -> Path | None:
    """The run's held-out demonstrations, if there are some."""
    folder = root / "demonstrations" / "held_out"
    return folder if any(folder.glob("*.parquet")) else None
