"""Where training metrics go: metrics.jsonl always, TensorBoard, Weights & Biases and MLflow by config."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from actors.settings import Tracking


class Tracker:
    """Writes a step's numbers to every place that was asked for.

    Args:
        output: stage directory; gets `metrics.jsonl` and TensorBoard events.
        name: run and stage.
        tracking: which trackers.
        config: the stage's settings, for trackers that keep them.
        done: steps that a checkpoint has behind it; what was recorded of later ones is taken back.
    """

    def __init__(self, output: Path, name: str, tracking: Tracking, config: dict[str, Any], done: int = 0):
        output.mkdir(parents=True, exist_ok=True)
        path = output / "metrics.jsonl"
        kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _within(line, done)] if done else []
        path.write_text("".join(kept), encoding="utf-8")
        self.lines = path.open("a", encoding="utf-8")
        self.board: Any = None
        self.wandb: Any = None
        self.mlflow: Any = None
        if tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            for stale in [] if done else output.glob("events.out.tfevents.*"):
                stale.unlink()
            self.board = SummaryWriter(str(output), purge_step=done + 1 if done else None)
        if tracking.wandb_project:
            self.wandb = importlib.import_module("wandb").init(project=tracking.wandb_project, name=name, config=config)
        if tracking.mlflow_uri:
            self.mlflow = importlib.import_module("mlflow")
            self.mlflow.set_tracking_uri(tracking.mlflow_uri)
            self.mlflow.set_experiment(name.partition("/")[0])
            self.mlflow.start_run(run_name=name)
            self.mlflow.log_params(_flat(config))

    def log(self, metrics: dict[str, float]) -> None:
        """Records one step; `metrics["step"]` is its number."""
        self.lines.write(json.dumps(metrics) + "\n")
        self.lines.flush()
        step = int(metrics["step"])
        numbers = {key: value for key, value in metrics.items() if key not in ("step", "steps")}
        if self.board:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)
        if self.mlflow:
            self.mlflow.log_metrics(numbers, step=step)

    def close(self) -> None:
        """Flushes and closes all of them."""
        self.lines.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()
        if self.mlflow:
            self.mlflow.end_run()


def require(tracking: Tracking) -> None:
    """Looks, on every worker, whether the trackers that were asked for are installed: one that stopped alone would leave the others
    waiting.

    Raises:
        ValueError: one is not.
    """
    for package, key, asked in (("wandb", "wandb_project", tracking.wandb_project), ("mlflow", "mlflow_uri", tracking.mlflow_uri)):
        if asked and importlib.util.find_spec(package) is None:
            raise ValueError(f"tracking.{key} is set, but {package} is not installed on the workers: install the extra {package!r}")


def _within(line: str, done: int) -> bool:
    """Whether a line is of one of the first `done` steps; one that was cut off when its process died is of none."""
    return line.endswith("\n") and bool(json.loads(line)["step"] <= done)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; MLflow takes no others, and no long values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)[:500]}
    return flat
