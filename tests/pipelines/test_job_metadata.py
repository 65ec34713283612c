"""What is laid over a job's metadata; the real thing under `ray job submit` is in test_submission.py."""

import json
from typing import Any

import pytest
from ray.experimental import internal_kv

from pipelines.watching import job_metadata
from pipelines.watching.job_metadata import JobMetadata, submission
from pipelines.watching.watch import Progress

GIVEN = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The cluster's key-value store."""
    kept: dict[str, str] = {}
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key, namespace: kept.get(key))
    monkeypatch.setattr(internal_kv, "_internal_kv_put", lambda key, value, namespace: kept.__setitem__(key, value))
    return kept


def metadata(store: dict[str, str]) -> Any:
    (value,) = store.values()
    return json.loads(value)["metadata"]


def test_only_a_submitted_job_has_metadata(monkeypatch: pytest.MonkeyPatch, store: dict[str, str]) -> None:
    monkeypatch.delenv(GIVEN, raising=False)
    assert submission() is None
    JobMetadata("mine").began(Progress(("sft/training",), 0.0))
    assert store == {}
    monkeypatch.setenv(GIVEN, json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}}))
    assert submission() == "raysubmit_1"


def test_the_stage_and_how_far_it_is_are_laid_over_what_a_person_gave(monkeypatch: pytest.MonkeyPatch, store: dict[str, str]) -> None:
    monkeypatch.setenv(GIVEN, json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}}))
    store["_ray_internal_job_info_raysubmit_1"] = json.dumps({"status": "RUNNING", "entrypoint": "x", "metadata": {"team": "blue"}})
    told = JobMetadata("mine")
    told.began(Progress(("sft/samples", "iteration-1/negatives"), 0.0))
    assert metadata(store) == {
        "team": "blue",
        "gsil_run": "mine",
        "gsil_stage": "sft/samples + iteration-1/negatives",
        "gsil_progress": "starting",
    }
    told.goes_on(Progress(("sft/training",), 9.0, "steps", 4, 16))
    assert metadata(store)["gsil_progress"] == "starting", "it was written a moment ago"
    told.written -= job_metadata.EVERY_SECONDS
    told.goes_on(Progress(("sft/training",), 9.0, "steps", 4, 16))
    assert metadata(store)["gsil_progress"] == "4 of 16 steps" and metadata(store)["gsil_stage"] == "sft/training"
    assert json.loads(store["_ray_internal_job_info_raysubmit_1"])["entrypoint"] == "x"


def test_a_job_that_has_ended_stays_as_it_is(store: dict[str, str]) -> None:
    store["_ray_internal_job_info_gone"] = was = json.dumps({"status": "STOPPED", "metadata": None})
    job_metadata.put("gone", {"gsil_stage": "sft/training"})
    assert store == {"_ray_internal_job_info_gone": was}
