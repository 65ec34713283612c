"""Where a Ray Train worker begins. Ray's controller and the job's driver import this file too, and have no use for torch."""

from typing import Any

from actors.loading import loading


def run(job: dict[str, Any]) -> None:
    """Runs a worker; see `actors.learner.worker.run`."""
    with loading():
        import deepspeed  # noqa: F401

        from actors.learner import worker
    worker.run(job)
