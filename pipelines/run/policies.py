"""The policies of a run, found from its files."""

import logging
from pathlib import Path
from typing import Any

from actors.storage import damage
from pipelines.run import sections
from pipelines.run.artifacts import StageError
from pipelines.run.manifests import present, read_manifest
from pipelines.settings import Model

log = logging.getLogger(__name__)

CONFIGS = ("config.yaml", "reward-config.yaml")
MEND = "mend it, or run the job that wrote it again"


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
            damaged = "has a damaged manifest, and its job makes it anew"
            why = "was made from what the run has replaced since" if read_manifest(path) else damaged
            log.warning("%s %s: it is none of the run's policies", path.parent, why)
    for manifest in manifests:
        folder = root / manifest["name"] / "policy"
        if manifest["name"].endswith("/training") and folder.is_dir():
            found[manifest["name"].partition("/")[0]] = Model(path=str(folder), trust_remote_code=base.trust_remote_code)
    return found


def require_intact(path: str) -> None:
    """Makes sure that a local file or folder, where a stage of some run made it, is what was written.

    Raises:
        StageError: it is not.
    """
    place = Path(path).expanduser().absolute()
    for stage in place.parents:
        file = stage / "manifest.json"
        manifest = read_manifest(file)
        if manifest is None and file.is_file() and b'"fingerprint"' in file.read_bytes():
            raise StageError(f"{file} is damaged: run the job that made it again, which makes {stage} anew")
        # Others have files of that name, too.
        if not manifest or not {"fingerprint", "files", "checksums"} <= manifest.keys():
            continue
        within = place.relative_to(stage).as_posix()
        sizes = {name: size for name, size in manifest["files"].items() if name == within or name.startswith(f"{within}/")}
        if why := damage(stage, sizes, {name: manifest["checksums"][name] for name in sizes}):
            raise StageError(f"{stage / why}: run the job that made it again, which makes it anew")
        return


def demonstrations(root: Path) -> dict[str, Any] | None:
    """The settings with which the run's held-out demonstrations are read again, none of them longer than allowed; None if there are
    none."""
    folder = root / "demonstrations" / "held_out"
    if not any(folder.glob("*.parquet")):
        return None
    config = next((found for name in CONFIGS if (root / name).is_file() and (found := _section(root / name, "demonstrations"))), {})
    given = {name: config[name] for name in ("max_prompt_tokens", "max_tokens") if name in config}
    return given | {"path": str(folder), "layout": "prompt_completion", "columns": {"completion": "response"}}


def read_config(file: Path) -> dict[str, Any]:
    """The config that a job left in its run directory.

    Raises:
        StageError: it cannot be read.
    """
    try:
        return sections.read(file)
    except sections.SectionsError as error:
        raise StageError(f"{error}; {MEND}") from None


def _section(file: Path, name: str) -> dict[str, Any]:
    found = read_config(file).get(name) or {}
    if not isinstance(found, dict):
        raise StageError(f"{file}: {name!r} must be a section, not {found!r}; {MEND}")
    return found
