"""Counts and histograms of the gateway, in Prometheus' format.

The gateway's processes on a node count together: each writes to files in `PROMETHEUS_MULTIPROC_DIR`, whoever is asked adds up. The variable
has to be set before this module is imported; without it a process counts alone.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from pipelines.serving.protocol import Usage

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
QUEUED = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
REWARDS = (-20, -10, -5, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 5, 10, 20)


class Metrics:
    """Metrics of the gateway, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # What is counted in files is read from there.
        own = None if FOLDER in os.environ else self.registry
        if own is None:
            MultiProcessCollector(self.registry)
        names = ["route", "status"]
        self._requests = Counter("gsil_requests", "Requests answered", names, registry=own)
        self._errors = Counter("gsil_errors", "Requests answered 4xx or 5xx", names, registry=own)
        self._latency = Histogram("gsil_request_seconds", "Time to an answer", names[:1], buckets=SECONDS, registry=own)
        self._tokens = Counter("gsil_tokens", "Tokens read and sampled", ["kind"], registry=own)
        self._rewards = Histogram("gsil_reward", "Rewards given", buckets=REWARDS, registry=own)
        self._queue = Histogram("gsil_queue_length", "Requests under way in a process when one comes", buckets=QUEUED, registry=own)
        self._running = Gauge("gsil_running", "Requests under way", multiprocess_mode="livesum", registry=own)
        self._under_way = 0

    def came(self) -> None:
        """A request came."""
        self._queue.observe(self._under_way)
        self._under_way += 1
        self._running.set(self._under_way)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """And was answered."""
        self._under_way -= 1
        self._running.set(self._under_way)
        self._requests.labels(route=route, status=status).inc()
        if status >= 400:
            self._errors.labels(route=route, status=status).inc()
        self._latency.labels(route=route).observe(seconds)

    def sampled(self, usage: Usage, rewards: Sequence[float | None]) -> None:
        """Tokens of a request, and the rewards that it was given."""
        self._tokens.labels(kind="prompt").inc(usage.prompt_tokens)
        self._tokens.labels(kind="completion").inc(usage.completion_tokens)
        for reward in rewards:
            if reward is not None:
                self._rewards.observe(reward)

    def judged(self, usage: Usage) -> None:
        """Tokens of a request to the judge."""
        self._tokens.labels(kind="judge prompt").inc(usage.prompt_tokens)
        self._tokens.labels(kind="judge completion").inc(usage.completion_tokens)

    def exposition(self) -> tuple[bytes, int, dict[str, str]]:
        """Body, status and headers of the answer to Prometheus."""
        if FOLDER in os.environ:
            _forget_the_dead(Path(os.environ[FOLDER]))
        return generate_latest(self.registry), 200, {"Content-Type": CONTENT_TYPE_LATEST}


def running(folder: Path) -> int:
    """Requests under way in all processes that count in a folder."""
    _forget_the_dead(folder)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    return int(registry.get_sample_value("gsil_running") or 0)


def _forget_the_dead(folder: Path) -> None:
    # A process that was killed has nothing under way.
    for path in folder.glob("gauge_live*.db"):
        pid = int(re.findall(r"\d+", path.stem)[-1])
        if not _lives(pid):
            mark_process_dead(pid, path=str(folder))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
