"""What a stage does where nodes are missing: it waits and says so, or stops where they can never come."""

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from autoscaling import autoscaling
from ray import cloudpickle
from ray.autoscaler.sdk import request_resources
from stages import planned

from actors.settings import Pool, Tracking
from pipelines import policy_training
from pipelines.run.artifacts import Run, Stage, StageError
from pipelines.run.keeping import Need
from pipelines.settings import RaySettings
from pipelines.workers import cluster
from pipelines.workers.shards import Shard, map_shards

# Ray's workers cannot import a test: the class travels with the task.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Writes:
    """An engine that takes a second a shard and writes on which node it was."""

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        import ray

        time.sleep(1)
        Path(output).write_text(ray.get_runtime_context().get_node_id())


def generate(run: Run, pool: Pool) -> set[str]:
    """Runs a stage of six shards; returns the nodes that it was on."""
    stage = Stage(f"negatives-{pool.num_gpus:g}", {})
    work = [Shard(stage, (), run.directory(stage) / f"{i}.parquet", {}, rows=1) for i in range(6)]
    map_shards(run, work, Writes, {}, pool, {})
    return {shard.output.read_text() for shard in work}


def workers() -> int:
    """Nodes beside the head."""
    import ray

    return sum(node["Alive"] for node in ray.nodes()) - 1


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.2)
    return time.monotonic() - began


def test_what_a_cluster_of_fixed_size_lacks_is_waited_for_and_then_told(
    local_ray: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StageError, match=r"negatives-4 asks for 2 x \(1 CPU, 4 GPU\), the cluster has room for 0: no more nodes came"):
        generate(Run(tmp_path, patience=1), Pool(min_actors=2, max_actors=2, num_gpus=4))
    assert "waits for nodes since" in caplog.text


def asked() -> Any:
    """What the autoscaler is asked for (v1)."""
    from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
    from ray.experimental.internal_kv import _internal_kv_get

    return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the head does not answer")])
def test_nothing_stays_asked_for_when_a_stage_stops_waiting(
    error: BaseException, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    while_it_waits: list[Any] = []

    def stop(_: float) -> None:
        while_it_waits.append(asked())
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(cluster.time, "sleep", stop)
        with pytest.raises(type(error)):
            cluster.wait_for(Run(tmp_path), "negatives", Need(2, 1, 4))
    assert while_it_waits == [[{"CPU": 1, "GPU": 4}] * 2] and asked() == []
    # What a person asks for stays where there is nothing to wait for.
    request_resources(bundles=[{"GPU": 4}])
    cluster.wait_for(Run(tmp_path), "negatives", Need(1, 1))
    assert asked() == [{"GPU": 4}]
    request_resources(bundles=[])


def test_room_is_counted_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[dict[str, Any]] = [
        {"NodeID": f"{k}", "Alive": True, "Resources": {"CPU": 8, "GPU": gpus}} for k, gpus in enumerate((4, 3, 0))
    ]
    nodes.append({"NodeID": "gone", "Alive": False, "Resources": {"GPU": 8}})
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    alive = cluster.total()
    assert Need(1, cpus=1, gpus=2).room(alive) == 3, "two halves of a node are no node"
    assert Need(1, cpus=0.5, gpus=0).room(alive) == 48 and Need(1, cpus=0, gpus=8).room(alive) == 0


def test_only_an_autoscaler_that_knows_of_the_request_says_that_it_can_never_be() -> None:
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    bundle, status = {"CPU": 1.0, "GPU": 4.0}, GetClusterStatusReply()
    told = status.autoscaling_state
    told.last_seen_cluster_resource_state_version = 7
    refused = told.infeasible_cluster_resource_constraints.add().resource_requests.add(count=2)
    refused.request.resources_bundle.update(bundle)
    assert cluster.can_never_be(status, bundle, 2, since=6)
    assert not cluster.can_never_be(status, bundle, 1, since=6), "another job asked for two"
    assert not cluster.can_never_be(status, {"CPU": 1}, 2, since=6)
    assert not cluster.can_never_be(status, bundle, 2, since=7), "before it has looked"
    told.pending_instances.add()
    assert not cluster.can_never_be(status, bundle, 2, since=6), "what a machine has is known when it has joined"


@pytest.mark.slow
@pytest.mark.parametrize("v2", [True, False], ids=["v2", "v1"])
def test_nodes_come_for_generation_go_after_it_and_come_again_for_training(
    v2: bool, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    types = {"gpu": {"resources": {"CPU": 1, "GPU": 1}, "max_workers": 2}, "cpu": {"resources": {"CPU": 1}, "max_workers": 2}}
    caplog.set_level(logging.INFO)
    with autoscaling(tmp_path, types, v2=v2) as address, cluster.connected(RaySettings(address=address)):
        assert workers() == 0
        run = Run(tmp_path / "run", patience=120)
        assert len(generate(run, Pool(min_actors=2, max_actors=2, num_gpus=1))) == 2
        assert "negatives-1 asks for 2 x (1 CPU, 1 GPU), the cluster has room for 0: waits for nodes since" in caplog.text
        assert "negatives-1: the nodes are there after" in caplog.text
        print("down after", wait_until(lambda: workers() == 0, 90))
        if v2:
            began = time.monotonic()
            with pytest.raises(StageError, match=r"negatives-4 asks for 1 x \(1 CPU, 4 GPU\): no node type of this cluster can give that"):
                generate(run, Pool(num_gpus=4))
            assert time.monotonic() - began < 20
        run, training, stages = planned(tmp_path / "run", tiny, [None], workers=2, epochs=1)
        run.do(policy_training.train(training, Tracking(), 64, False), *stages)
        assert workers() >= 2 and run.manifest(stages[0])
        print("down after", wait_until(lambda: workers() == 0, 90))
