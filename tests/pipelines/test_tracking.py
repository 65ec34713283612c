"""Training metrics reach every tracker that was asked for."""

import json
import time
from pathlib import Path

import pytest

from actors.learner.tracking import Tracker, require
from actors.settings import Tracking
from pipelines.report import attached
from pipelines.report.attached import attach

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


def test_a_line_that_was_cut_off_is_of_no_step(tmp_path: Path) -> None:
    track(tmp_path, Tracking(tensorboard=False))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    tracker = Tracker(tmp_path, "job/sft/training", Tracking(tensorboard=False), {}, done=2)
    tracker.log({"step": 3, "steps": 3, "loss": 0.25})
    tracker.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_the_numbers_of_an_evaluation_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    page = tmp_path / "evaluation-report.html"
    found = {
        "run": "job",
        "tasks": {"sft": {"gsm8k": {"n": 40, "shots": 5, "main": "exact_match"}}},
        "tournament": {"pairs": [{"first": "a", "second": "b", "win": 0.5}], "ranking": [{"name": "a", "rating": 1000}]},
        "mt_bench": None,
        "best_of_n": {"sizes": [1, 4], "selectors": {"bt": {"win_rate": [0.5, None], "golden": [0.25, 0.75]}}},
        "stages": [{"name": "x", "seconds": 1}],
    }
    page.with_suffix(".md").write_text("# job: evaluation")
    for _ in range(2):
        attach(Tracking(), tmp_path, page, found)
    (events,) = (tmp_path / "evaluation-tensorboard").glob("events.out.tfevents.*")
    board = EventAccumulator(str(events))
    board.Reload()
    (told,) = (event.tensor_proto.string_val[0].decode() for event in board.Tensors("report"))
    (places,) = (event.tensor_proto.string_val[0].decode() for event in board.Tensors("places"))
    assert told == "# job: evaluation" and f"- directory: {tmp_path}\n- report: {page}" in places
    shown = {tag: board.Scalars(tag)[0].value for tag in board.Tags()["scalars"]}
    assert shown == {
        "tasks/sft/gsm8k/n": 40,
        "tasks/sft/gsm8k/shots": 5,
        "tournament/pairs/a-b/win": 0.5,
        "tournament/ranking/a/rating": 1000,
        "best_of_n/selectors/bt/win_rate/1": 0.5,
        "best_of_n/selectors/bt/golden/1": 0.25,
        "best_of_n/selectors/bt/golden/4": 0.75,
    }


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


FOUND = {"final": "sft", "policies": {"base": {"accuracy": 0.0, "stderr": None, "n": 8}, "sft": {"accuracy": 0.25, "stderr": 0.1, "n": 8}}}


def report(root: Path) -> Path:
    root.mkdir()
    (root / "report.md").write_text("# job")
    (root / "report.html").write_text("<!doctype html>")
    return root / "report.html"


def test_the_report_is_attached_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    uri = (tmp_path / "mlruns").as_uri()
    attach(Tracking(mlflow_uri=uri), tmp_path / "job", report(tmp_path / "job"), FOUND)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("job")
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "job/report" and run.data.params["directory"] == str(tmp_path / "job")
    assert run.data.metrics == {"base/accuracy": 0.0, "base/n": 8.0, "sft/accuracy": 0.25, "sft/stderr": 0.1, "sft/n": 8.0}
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"report.html", "report.md"}


def test_the_report_is_attached_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    # It remembers the folder of the test before.
    wandb.teardown()
    for key, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(key, value)
    attach(Tracking(wandb_project="alignment"), tmp_path / "job", report(tmp_path / "job"), FOUND)
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while b"sft/accuracy" not in written.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.2)
    content = written.read_bytes()
    assert b"job/report" in content and b"sft/accuracy" in content and b"report.html" in content


def test_a_tracker_that_is_away_costs_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nowhere = tmp_path / "file"
    nowhere.write_text("no folder")
    attach(Tracking(mlflow_uri=(nowhere / "x").as_uri()), tmp_path / "job", report(tmp_path / "job"), FOUND)
    assert "the report could not be sent to" in caplog.text


def test_names_that_mlflow_would_take_for_the_same_are_told_apart() -> None:
    asked = {"sft/regex:a+/mean": 0.1, "sft/regex:a*/mean": 0.2, "sft/regex_a_/mean": 0.3, "sft/n": 4.0}
    named = {"sft/regex_a_/mean": 0.1, "sft/regex_a_/mean_2": 0.2, "sft/regex_a_/mean_3": 0.3, "sft/n": 4.0}
    assert attached._spelt(asked) == named


def test_what_a_job_found_is_in_its_tensorboard_with_the_report(undisturbed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(undisturbed / "tensorboard"))
    board.Reload()
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert {f"{name}/n" for name in summary["policies"]} <= set(board.Tags()["scalars"])
    (report,) = (event.tensor_proto.string_val[0].decode() for event in board.Tensors("report"))
    assert report == (undisturbed / "report.md").read_text()
    curves = EventAccumulator(str(undisturbed / "iteration-1" / "training"))
    curves.Reload()
    assert {"loss", "reward_real", "reward_generated", "margin", "grad_norm"} <= set(curves.Tags()["scalars"])
