"""Our application on Ray Serve with models that only wait: python tests/support/stub_serve.py --server.port N [--section.key value ...]

The reward model's directory is the value that it gives: `--reward.models "{reward: '1.5'}"`. With --address it updates a service that runs.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pipelines.serving.prompts import About
from pipelines.serving.rewards import Rewards
from pipelines.serving.samples import Draw, Sample, Samples

SECONDS = 0.05


class WaitingReward:
    """Every reward is the same."""

    def __init__(self, name: str, value: str, *_: Any):
        self.name, self.value = name, float(value)

    async def about(self) -> About:
        return About(self.name, 2048, "stub", None)

    async def rewards(self, items: Sequence[Any]) -> Rewards:
        await asyncio.sleep(SECONDS)
        return Rewards([self.value] * len(items), [1] * len(items))


class WaitingPolicy:
    """Says the same all the time; to whoever says "slow" after half a minute, to whoever says "patient" after some seconds."""

    def __init__(self, name: str, *_: Any):
        self.name = name

    async def about(self) -> About:
        return About(self.name, 2048, "stub", None)

    async def sample(self, prompt: Any, draw: Draw) -> Samples:
        await asyncio.sleep(_seconds(prompt))
        return Samples([1], [Sample("word", [2], "stop")] * draw.n)

    async def stream(self, prompt: Any, draw: Draw) -> AsyncIterator[Samples]:
        yield Samples([1], [Sample("two", [2], None)])
        await asyncio.sleep(_seconds(prompt))
        yield Samples([1], [Sample(" words", [3], "stop")])


def _seconds(prompt: Any) -> float:
    return 30 if "slow" in str(prompt) else 6 if "patient" in str(prompt) else SECONDS


def main(argv: list[str]) -> None:
    import ray

    from jobs.config import build
    from jobs.schemas import ServeConfig
    from pipelines.serving import application, models, start
    from pipelines.workers import cluster

    application.RewardReplica = WaitingReward  # type: ignore[misc, assignment]
    application.PolicyReplica = WaitingPolicy  # type: ignore[misc, assignment]
    application.checked_weights = lambda path, server: path
    config = build(ServeConfig, argv)
    os.environ |= models.environment(config)
    with cluster.connected(config.ray):
        print(f"cluster: {ray.get_runtime_context().gcs_address}")
        start.start(config, told=lambda states: print(states, flush=True))
        if not config.ray.address:
            for stop in (signal.SIGINT, signal.SIGTERM):
                signal.signal(stop, signal.default_int_handler)
            start.stay(config.server)


if __name__ == "__main__":
    # By its name, so that the replicas find the classes.
    import stub_serve

    stub_serve.main(sys.argv[1:])
