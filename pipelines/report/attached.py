"""The report of a finished run and its numbers, sent to the trackers that have its training curves."""

import importlib
import itertools
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.settings import Tracking

log = logging.getLogger("gsil")

UNPREFIXED = ("policies", "rewards")
"""Keys of the summary that name nothing: what they are about is told by the names below them."""


def attach(tracking: Tracking, root: Path, page: Path, found: Mapping[str, Any]) -> None:
    """Sends report, numbers and the places of what the run made, as one tracked run called RUN/report; TensorBoard has them in a folder
    beside the page, the report as text. A tracker that cannot be reached costs no run: the log says so.

    Args:
        tracking: which trackers.
        root: the run directory.
        page: the report; its Markdown lies beside it.
        found: what summary.json holds.
    """
    name, places = f"{root.name}/report", {"directory": str(root), "report": str(page), "final": str(found.get("final"))}
    board = page.with_name(page.name.replace("report.html", "tensorboard")) if tracking.tensorboard else None
    senders: list[tuple[Any, Callable[..., None]]]
    senders = [(board, _to_tensorboard), (tracking.wandb_project, _to_wandb), (tracking.mlflow_uri, _to_mlflow)]
    for asked, send in senders:
        if asked:
            try:
                send(asked, name, places, numbers(found), [page, page.with_suffix(".md")])
            except Exception as error:
                log.warning("the report could not be sent to %s: %s: %s", asked, type(error).__name__, error)
                log.debug("", exc_info=True)


def numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a summary by its place: "sft/accuracy" of a policy, "tasks/sft/gsm8k/n" of an evaluation."""
    told = {key: value for key, value in found.items() if key not in ("stages", "warnings")}
    unprefixed = {name: group for key in UNPREFIXED for name, group in told.pop(key, {}).items()}
    return dict(_leaves(told)) | dict(_leaves(unprefixed))


def _leaves(found: Any, place: str = "", sizes: Sequence[int] = ()) -> Iterator[tuple[str, float]]:
    """Numbers by their place; those of a curve by the N that they are of, where `sizes` stands above them (Best-of-N)."""
    if isinstance(found, Mapping):
        sizes = found.get("sizes", sizes)
        for key, value in found.items():
            yield from _leaves(value, f"{place}/{key}" if place else str(key), sizes) if key != "sizes" else ()
    elif isinstance(found, list):
        names = sizes if len(sizes) == len(found) else range(1, len(found) + 1)
        for number, value in zip(names, found, strict=True):
            own: Any = number
            if isinstance(value, Mapping):
                own = value.get("name") or "-".join(value[key] for key in ("first", "second") if key in value) or number
            yield from _leaves(value, f"{place}/{own}", sizes)
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield place, float(found)


def _to_tensorboard(folder: Path, name: str, places: dict[str, str], metrics: dict[str, float], files: list[Path]) -> None:
    # Its own writer: torch's would load torch into the driver.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for stale in folder.glob("events.out.tfevents.*"):
        stale.unlink()
    writer = EventFileWriter(str(folder))
    texts = {"places": "\n".join(f"- {what}: {place}" for what, place in places.items())}
    for file in files:
        if file.suffix == ".md" and file.exists():
            texts["report"] = file.read_text(encoding="utf-8")
    for tag, text in texts.items():
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]))
        about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        summary = Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=tensor)])
        writer.add_event(Event(wall_time=time.time(), step=0, summary=summary))
    for key, value in metrics.items():
        writer.add_event(Event(wall_time=time.time(), step=0, summary=Summary(value=[Summary.Value(tag=key, simple_value=value)])))
    writer.close()


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
        mlflow.log_metrics(_spelt(metrics))
        for file in files:
            mlflow.log_artifact(str(file))


def _spelt(metrics: dict[str, float]) -> dict[str, float]:
    """Named by the letters that MLflow takes. Of two names that are then the same ("regex:a+" and "regex:a*") the second has a number."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        name = spelt = re.sub(r"[^\w./ -]", "_", key)
        for number in itertools.count(2):
            if name not in found:
                break
            name = f"{spelt}_{number}"
        found[name] = value
    return found
