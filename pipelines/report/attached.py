"""The report of a finished run, sent to the trackers that have its training curves."""

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.settings import Tracking

log = logging.getLogger("gsil")


def attach(tracking: Tracking, root: Path, page: Path, found: Mapping[str, Any]) -> None:
    """Sends report, numbers and the places of what the run made, as one tracked run called RUN/report. A tracker that cannot be
    reached costs no run: the log says so.

    Args:
        tracking: which trackers.
        root: the run directory.
        page: the report; its Markdown lies beside it.
        found: what summary.json holds.
    """
    name, places = f"{root.name}/report", {"directory": str(root), "report": str(page), "final": str(found.get("final"))}
    for asked, send in ((tracking.wandb_project, _to_wandb), (tracking.mlflow_uri, _to_mlflow)):
        if asked:
            try:
                send(asked, name, places, numbers(found), [page, page.with_suffix(".md")])
            except Exception as error:
                log.warning("the report could not be sent to %s: %s: %s", asked, type(error).__name__, error)
                log.debug("", exc_info=True)


def numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """Of every policy or reward model, as "NAME/METRIC"."""
    groups = {**found.get("policies", {}), **found.get("rewards", {})}
    return {
        f"{name}/{key}": float(value)
        for name, group in groups.items()
        for key, value in group.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _to_wandb(project: str, name: str, places: dict[str, str], metrics: dict[str, float], files: list[Path]) -> None:
    wandb: Any = importlib.import_module("wandb")
    with wandb.init(project=project, name=name, config=places) as tracked:
        tracked.log(metrics)
        artifact = wandb.Artifact(name.replace("/", "-"), type="report")
        for file in files:
            artifact.add_file(str(file))
        tracked.log_artifact(artifact)


def _to_mlflow(uri: str, name: str, places: dict[str, str], metrics: dict[str, float], files: list[Path]) -> None:
    mlflow: Any = importlib.import_module("mlflow")
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(name.partition("/")[0])
    with mlflow.start_run(run_name=name):
        mlflow.log_params(places)
        mlflow.log_metrics(metrics)
        for file in files:
            mlflow.log_artifact(str(file))
