"""Where a Ray Train worker begins. Ray's controller and the job's driver import this file too, and have no use for torch."""

import json
from pathlib import Path
from typing import Any

from actors.loading import loading

TRAINED = "trained.json"
"""Written last: who trains several models in turn need not do one again when another was stopped."""


def run(told: dict[str, Any]) -> None:
    """Runs a worker of a gang through its `orders`: lists of arguments of `actors.learner.worker.TrainJob`. Ends when one fails for a
    reason that stays, or with the orders."""
    with loading():
        import deepspeed  # noqa: F401
        import ray
        import torch.distributed as dist

        from actors.learner import worker
    orders = told["orders"]
    number = ray.get(orders.begin.remote())
    while (jobs := ray.get(orders.next.remote(number))) is not None:
        # The others take the first one's word for what is left: files may reach their nodes later.
        left = [[number for number, job in enumerate(jobs) if trained(job["output"]) is None]]
        dist.broadcast_object_list(left)
        if not all(worker.run(jobs[job]) for job in left[0]):
            return
        number += 1
        if dist.get_rank() == 0:
            ray.get(orders.reached.remote(number))


def trained(output: str) -> dict[str, float] | None:
    """How many `seconds` the training into a directory took, and its steps and measurements of them (`work`); None if it is not done."""
    done = Path(output, TRAINED)
    return json.loads(done.read_text(encoding="utf-8")) if done.exists() else None
