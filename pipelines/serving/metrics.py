"""Counts and histograms of a gateway process, in Prometheus' format.

Several gateway processes count apart: the label `gateway` says which one answered, sums are Prometheus' work.
"""

from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipelines.serving.protocol import Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
QUEUED = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
REWARDS = (-20, -10, -5, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 5, 10, 20)


class Metrics:
    """Of one gateway process.

    Args:
        gateway: its name.
    """

    def __init__(self, gateway: str):
        self.registry = CollectorRegistry()
        label = {"gateway": gateway}
        names = ["gateway", "route", "status"]
        self._label = label
        self._requests = Counter("gsil_requests", "Requests answered", names, registry=self.registry)
        self._errors = Counter("gsil_errors", "Requests answered 4xx or 5xx", names, registry=self.registry)
        self._latency = Histogram("gsil_request_seconds", "Time to an answer", names[:2], buckets=SECONDS, registry=self.registry)
        self._tokens = Counter("gsil_tokens", "Tokens read and sampled", ["gateway", "kind"], registry=self.registry)
        self._rewards = Histogram("gsil_reward", "Rewards given", ["gateway"], buckets=REWARDS, registry=self.registry)
        self._queue = Histogram(
            "gsil_queue_length",
            "Requests under way when one comes",
            ["gateway"],
            buckets=QUEUED,
            registry=self.registry,
        )
        self._running = Gauge("gsil_running", "Requests under way", ["gateway"], registry=self.registry).labels(**label)
        self._under_way = 0

    def came(self) -> None:
        """A request came."""
        self._queue.labels(**self._label).observe(self._under_way)
        self._under_way += 1
        self._running.set(self._under_way)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """And was answered."""
        self._under_way -= 1
        self._running.set(self._under_way)
        self._requests.labels(**self._label, route=route, status=status).inc()
        if status >= 400:
            self._errors.labels(**self._label, route=route, status=status).inc()
        self._latency.labels(**self._label, route=route).observe(seconds)

    def sampled(self, usage: Usage, rewards: Sequence[float | None]) -> None:
        """Tokens of a request, and the rewards that it was given."""
        self._tokens.labels(**self._label, kind="prompt").inc(usage.prompt_tokens)
        self._tokens.labels(**self._label, kind="completion").inc(usage.completion_tokens)
        for reward in rewards:
            if reward is not None:
                self._rewards.labels(**self._label).observe(reward)

    def exposition(self) -> tuple[bytes, int, dict[str, str]]:
        """Body, status and headers of the answer to Prometheus."""
        return generate_latest(self.registry), 200, {"Content-Type": CONTENT_TYPE_LATEST}
