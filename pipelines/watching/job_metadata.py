"""The current stage in the metadata of a job that came by `ray job submit`: `ray job list`, and the job's page in Ray's dashboard.

Ray has no call that changes the metadata of a job that runs. What its job manager knows of a job is a JSON object in the cluster's
key-value store (`ray.dashboard.modules.job.common.JobInfo`, Ray 2.60), and this changes the one key in it. Where Ray keeps it otherwise,
`Watch` hears of it once and goes on without.
"""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from pipelines.watching.watch import Progress, Watcher

EVERY_SECONDS = 10.0
"""Between two changes while a stage runs."""


class JobMetadata(Watcher):
    """Writes `gsil_run`, `gsil_stage` and `gsil_progress`.

    Args:
        run: name of the run.
    """

    def __init__(self, run: str):
        self.run = run
        self.written = 0.0

    def began(self, progress: Progress) -> None:
        """At once."""
        self._write(progress.title, "starting")

    def goes_on(self, progress: Progress) -> None:
        """Every few seconds."""
        if progress.unit and time.monotonic() - self.written > EVERY_SECONDS:
            self._write(progress.title, f"{progress.done}{'' if progress.total is None else f' of {progress.total}'} {progress.unit}")

    def ended(self, stage: str, seconds: float, skipped: bool, numbers: Mapping[str, Any]) -> None:
        """So that the last stage is seen to be done."""
        if not skipped:
            self._write(stage, "done")

    def _write(self, stage: str, progress: str) -> None:
        if job := submission():
            self.written = time.monotonic()
            put(job, {"gsil_run": self.run, "gsil_stage": stage, "gsil_progress": progress})


def submission() -> str | None:
    """The submission id of the job that this process is the driver of; None if a person started it by hand."""
    given = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return (given.get("metadata") or {}).get("job_submission_id")


def put(job: str, metadata: Mapping[str, str]) -> None:
    """Lays `metadata` over that of a job which runs; of any other nothing is changed.

    Args:
        job: its submission id.
        metadata: texts by name.
    """
    from ray._private.ray_constants import KV_NAMESPACE_JOB
    from ray.dashboard.modules.job.common import JobInfoStorageClient
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job)
    info = json.loads(_internal_kv_get(key, namespace=KV_NAMESPACE_JOB) or "{}")
    # The job manager writes when a job begins and when it has ended: in between there is nobody to be in the way of.
    if info.get("status") == "RUNNING":
        info["metadata"] = {**(info.get("metadata") or {}), **metadata}
        _internal_kv_put(key, json.dumps(info), namespace=KV_NAMESPACE_JOB)
