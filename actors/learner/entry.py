"""Where a Ray Train worker begins. Ray's controller and the job's driver import this file too, and have no use for torch."""

import json
from pathlib import Path
from typing import Any

from actors.loading import loading

TRAINED = "trained.json"
"""Written last: who trains several models in turn need not do one again when another was stopped."""


def run(told: dict[str, Any]) -> None:
    """Runs a worker of a gang through `jobs`, arguments of `actors.learner.worker.TrainJob`, those that are not done."""
    with loading():
        import deepspeed  # noqa: F401

        from actors.learner import worker
    for job in told["jobs"]:
        if trained(job["output"]) is None and not worker.run(job):
            break


def trained(output: str) -> float | None:
    """Seconds that the training into a directory took; None if it is not done."""
    done = Path(output, TRAINED)
    return float(json.loads(done.read_text(encoding="utf-8"))["seconds"]) if done.exists() else None
