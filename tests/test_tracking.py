"""Training metrics reach every tracker that was asked for."""

import json
import time
from pathlib import Path

import pytest

from actors.learner.tracking import Tracker, require
from actors.settings import Tracking

STEPS = [{"step": 1, "steps": 2, "loss": 1.5}, {"step": 2, "steps": 2, "loss": 0.5}]


def track(output: Path, tracking: Tracking) -> None:
    tracker = Tracker(output, "job/sft/training", tracking, {"training": {"learning_rate": 0.1}})
    for step in STEPS:
        tracker.log(step)
    tracker.close()


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require(Tracking(wandb_project="alignment", mlflow_uri="http://tracking"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tracking\.mlflow_uri is set, but mlflow is not installed .* install the extra 'mlflow'"):
        require(Tracking(mlflow_uri="http://tracking"))


def test_lines_and_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        track(tmp_path, Tracking())
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == STEPS
    (events,) = tmp_path.glob("events.out.tfevents.*")
    board = EventAccumulator(str(events))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1.5), (2, 0.5)]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests have no tracking server; mlflow-skinny brings no database.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    uri = (tmp_path / "mlruns").as_uri()
    track(tmp_path, Tracking(mlflow_uri=uri))
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("job")
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "job/sft/training" and run.info.status == "FINISHED"
    assert run.data.params == {"training.learning_rate": "0.1"}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 1.5), (2, 0.5)]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    track(tmp_path, Tracking(wandb_project="alignment"))
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # wandb's own process writes: on a busy machine it ends after `finish` has returned.
    deadline = time.monotonic() + 30
    while written.read_bytes().count(b"loss") < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    content = written.read_bytes()
    assert b"alignment" in content and b"job/sft/training" in content and b"learning_rate" in content and content.count(b"loss") >= 2
