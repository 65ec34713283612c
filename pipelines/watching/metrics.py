"""What Prometheus knows of a run: gauges in Ray's own exporter, which every node of a cluster has. Ray puts `ray_` before their names.

Watch --> Metrics --> ray.util.metrics --> http://NODE:PORT/metrics --> Prometheus --> deploy/grafana/gsil.json
"""

from collections.abc import Mapping
from typing import Any

from pipelines.watching.watch import Progress, Watcher, iteration, title

LABELS = ("run", "stage", "iteration")
UNITS = ("rows", "steps", "answers")
"""What stages count."""
GAUGES = {
    "gsil_stage_active": "1 while the stage runs",
    "gsil_stage_seconds": "What a stage took that is done",
    "gsil_stage_seconds_left": "Until the running stage is done",
    **{f"gsil_{unit}": f"{unit.capitalize()} that are made in the running stage" for unit in UNITS},
    **{f"gsil_{unit}_wanted": f"{unit.capitalize()} that the running stage makes in all" for unit in UNITS},
    **{f"gsil_{unit}_per_second": f"{unit.capitalize()} a second of the running stage" for unit in UNITS},
    "gsil_tokens_per_second": "Tokens a second that the last step trained on",
    "gsil_rejected_rows": "Rows that a stage set aside: bad demonstrations, pairs of equal sides, questions without an answer",
    "gsil_restarts": "Times that an actor or a training worker of the running stage died and was started again",
}
"""Name -> what it says. All are gauges with the labels of LABELS."""
MOMENTARY = ("gsil_stage_active", "gsil_stage_seconds_left", "gsil_tokens_per_second", *(f"gsil_{unit}_per_second" for unit in UNITS))
"""What is 0 when nothing runs."""
ALSO = {"tokens_per_second": "gsil_tokens_per_second", "rejected": "gsil_rejected_rows", "restarts": "gsil_restarts"}
"""Gauges of a stage's other numbers."""


class Metrics(Watcher):
    """Sets the gauges. Ray has to be connected when the first stage begins, or is found done.

    Args:
        run: name of the run.
    """

    def __init__(self, run: str):
        self.run = run
        self.gauges: dict[str, Any] = {}
        self.live: set[tuple[str, ...]] = set()
        """stages of one call that run"""

    def began(self, progress: Progress) -> None:
        """It is the current stage."""
        self.live.add(progress.stages)
        self._set(progress.stages, {"gsil_stage_active": 1})

    def goes_on(self, progress: Progress) -> None:
        """As far as it has come."""
        self.live.add(progress.stages)
        told: dict[str, float] = {"gsil_stage_active": 1}
        if progress.unit:
            told |= {f"gsil_{progress.unit}": progress.done, f"gsil_{progress.unit}_per_second": progress.per_second or 0}
        if progress.total is not None:
            told[f"gsil_{progress.unit}_wanted"] = progress.total
        if progress.left is not None:
            told["gsil_stage_seconds_left"] = progress.left
        self._set(progress.stages, told | {ALSO[name]: value for name, value in progress.also.items() if name in ALSO})

    def ended(self, stage: str, seconds: float, skipped: bool, numbers: Mapping[str, Any]) -> None:
        """What it took and set aside; nothing of it goes on."""
        self._set((stage,), {"gsil_stage_seconds": seconds, "gsil_rejected_rows": rejected(numbers)})
        while not skipped and self.live:
            self._set(self.live.pop(), dict.fromkeys((name for name in MOMENTARY if name in self.gauges), 0))

    def _set(self, stages: tuple[str, ...], values: Mapping[str, float]) -> None:
        """Stages of one call are one series while they run: their rows come from the same actors."""
        from ray.util.metrics import Gauge

        labels = {"run": self.run, "stage": title(stages), "iteration": str(iteration(stages) or "")}
        for name, value in values.items():
            if name not in self.gauges:
                self.gauges[name] = Gauge(name, GAUGES[name], LABELS)
            self.gauges[name].set(value, labels)


def rejected(numbers: Mapping[str, Any]) -> int:
    """Rows that a stage set aside, by the numbers in its manifest."""
    pairs = numbers.get("train")
    dropped = pairs if isinstance(pairs, Mapping) else {}
    counts = (numbers.get("rejected"), numbers.get("failed"), dropped.get("identical"), dropped.get("dropped"))
    return sum(count for count in counts if isinstance(count, int))
