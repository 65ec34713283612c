"""The Ray cluster of a job: a running one, or a local instance that ends with the job; and whether it has what a stage asks for."""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines.run.artifacts import Run, StageError
from pipelines.run.keeping import WAITS_FOR_ACTORS, Keeper, Need
from pipelines.settings import RaySettings

log = logging.getLogger(__name__)
ANSWER_SECONDS = 10.0
"""in which a cluster takes a connection"""
SAY_EVERY_SECONDS = 60.0
"""Between two lines of a stage that waits for nodes."""
SPARE_BYTES = 8e9
"""of memory that have to be available on a local machine for who waits to stay: as much as the quickstart's training takes"""
LOOK_SECONDS = 5.0
"""between two looks at which nodes there are"""


@contextlib.contextmanager
def connected(settings: RaySettings) -> Iterator[str]:
    """Connects for the length of the block.

    Yields:
        where the logs of Ray, vLLM and DeepSpeed are.

    Raises:
        StageError: no cluster answers at the address, it is Ray Client's, or the local instance does not start.
    """
    import ray.data

    address = settings.address or os.environ.get("RAY_ADDRESS")
    # Ray Data draws bars of its own; the job has one display.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    options = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address:
        _check_answers(address)
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise StageError(f"no Ray cluster answers at {address!r}: {error}") from None
        # A job that was killed while it waited for nodes has left its request behind.
        _withdraw()
    else:
        _start_here(settings, options)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        _to_files_only("ray.data", "ray.train")
        with _watching_nodes() if address else contextlib.nullcontext():
            yield str(Path(ray._private.worker._global_node.get_session_dir_path()) / "logs")
    except KeyboardInterrupt:
        _let_go()
        raise
    finally:
        ray.shutdown()


def _let_go() -> None:
    """Ends the job's actors, and waits for the threads that wait for them: Ray that is shut down under a thread within it takes the whole
    process along, before a word is said."""
    import ray
    from ray._private.state import actors

    job = ray.get_runtime_context().get_job_id()
    # Nothing stands in the way of who interrupts, not even a head that is gone.
    with contextlib.suppress(Exception):
        for name, actor in actors(job_id=ray.JobID.from_hex(job)).items():
            # Those that others own end with these; a service is to stay.
            with contextlib.suppress(ValueError):
                if not actor["IsDetached"]:
                    ray._private.worker.global_worker.core_worker.kill_actor(ray.ActorID.from_hex(name), True)
    until = time.monotonic() + ANSWER_SECONDS
    for thread in threading.enumerate():
        if thread.name == WAITS_FOR_ACTORS:
            thread.join(max(0.0, until - time.monotonic()))


def _start_here(settings: RaySettings, options: dict[str, Any]) -> None:
    """Starts a local instance."""
    import ray
    from ray._common.utils import get_default_ray_temp_dir

    local = {"num_cpus": settings.num_cpus, "include_dashboard": False, "_metrics_export_port": settings.metrics_port}
    try:
        ray.init(address="local", **local, **options)
    except Exception as error:
        # Of any type: a process of Ray's that does not come up is an Exception without a name.
        raise StageError(
            f"a local Ray instance does not start: {str(error).rstrip('. ')}. On a busy machine a second try may do. Its files and "
            f"logs are in {get_default_ray_temp_dir()} (another place: RAY_TMPDIR, a short path on a disk with room); or name "
            "a running cluster with ray.address"
        ) from error


@contextlib.contextmanager
def _watching_nodes() -> Iterator[None]:
    """Logs, for the length of the block, which nodes join and which are gone."""
    over = threading.Event()

    def alive() -> dict[str, str]:
        return {
            name: f"node {node['NodeManagerHostname']} ({name[:8]}, {node['Resources'].get('CPU', 0):g} CPUs, "
            f"{node['Resources'].get('GPU', 0):g} GPUs)"
            for name, node in living().items()
        }

    def watch(known: dict[str, str]) -> None:
        while not over.wait(LOOK_SECONDS):
            try:
                now = alive()
            except Exception as error:  # noqa: BLE001
                if over.is_set():
                    return
                # The head does not answer: Ray ends the job if it stays so.
                log.warning("the cluster cannot be asked for its nodes: %s", error)
                continue
            for node in sorted(now.keys() - known.keys()):
                log.info("%s joined the cluster", now[node])
            for node in sorted(known.keys() - now.keys()):
                log.warning("%s is gone: what ran there starts again where there is room", known[node])
            known = now

    watcher = threading.Thread(target=watch, args=(alive(),), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        # Before Ray is gone under it; not for ever, where the head does not answer.
        watcher.join(ANSWER_SECONDS)


def living() -> dict[str, dict[str, Any]]:
    """The nodes that live, as Ray describes them, by their ids."""
    import ray

    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes for a cluster that is not there, and says nothing."""
    if address.startswith("ray://"):
        raise StageError(
            f"{address!r} is Ray Client's: a job needs a node of the cluster to run on. Submit it with ray job submit --address "
            "http://HEAD:8265 --working-dir . -- python jobs/..., or run it on a node with --ray.address HOST:6379"
        )
    host, _, port = address.rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        except OSError as error:
            raise StageError(f"no Ray cluster answers at {address!r}: {error.strerror or error}") from None


def _to_files_only(*names: str) -> None:
    """Takes libraries' log lines off the terminal; their own files under the session's logs keep them."""
    for name in names:
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.handlers = [h for h in logger.handlers if isinstance(h, logging.FileHandler) or "File" in type(h).__name__]


def person_can_mend(error: BaseException) -> StageError | None:
    """The `StageError` behind an exception, also one that was raised in a worker."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or any(current is known for known in seen):
            continue
        if type(current) is StageError:
            return current
        seen.append(current)
        waiting += [current.__cause__, current.__context__, getattr(current, "cause", None)]
    return None


def keeper(settings: RaySettings) -> Keeper:
    """The keeper of a job's pools. On a cluster memory is a matter of its node types; here it is shared with whatever else runs."""
    local = not (settings.address or os.environ.get("RAY_ADDRESS"))
    return Keeper(settings.keep_warm_minutes * 60, SPARE_BYTES if local else 0)


def check_fits(address: str | None, demands: Mapping[str, tuple[float, float]]) -> None:
    """Stops before a local instance would wait for ever for CPUs or GPUs that it does not have.

    Args:
        address: of a running cluster, which may grow: there each stage asks for itself (`wait_for`).
        demands: least (CPUs, GPUs) that must be free at one time, by the setting that asks for them.

    Raises:
        StageError: one of them is more than there is.
    """
    import ray

    if address or os.environ.get("RAY_ADDRESS"):
        return
    has = ray.cluster_resources()
    for setting, (cpus, gpus) in demands.items():
        for kind, asked in (("CPU", cpus), ("GPU", gpus)):
            here = has.get(kind, 0)
            if asked > here:
                more = "raise ray.num_cpus, also above what the machine has: processes then share its cores"
                mend = f"lower it, or {more if kind == 'CPU' else 'run on a machine that has them'}"
                raise StageError(f"{setting} asks for {asked:g} {kind}s at once, this machine has {here:g}: {mend}")


def wait_for(run: Run, name: str, need: Need) -> None:
    """Returns when the cluster has nodes for what a stage needs at least. Asks its autoscaler for them, and says what it waits for.

    Args:
        run: its `patience` is how long.
        name: of the stage.
        need: of the stage.

    Raises:
        StageError: no node type of the cluster can give it, or it has not come in time.
    """
    if need.room(total()) >= need.count:
        return
    try:
        _wait(run, name, need)
    finally:
        # Whatever came of it: a request outlives who made it.
        _withdraw()


def _wait(run: Run, name: str, need: Need) -> None:
    from ray.autoscaler.sdk import request_resources

    count, bundle = need.count, need.each()
    wanted = f"{name} asks for {count} x ({need.cpus:g} CPU, {need.gpus:g} GPU)"
    began, at = time.monotonic(), datetime.now().astimezone()
    said: float | None = None
    since: int | None = None
    while (there := need.room(total())) < count:
        # Again and again: a request of another job replaces this one.
        request_resources(bundles=[bundle] * count)
        waited = time.monotonic() - began
        status = _status()
        since = status.cluster_resource_state.cluster_resource_state_version if since is None else since
        if can_never_be(status, bundle, count, since):
            raise StageError(f"{wanted}: no node type of this cluster can give that; lower it, or add a node type")
        if waited > run.patience:
            raise StageError(
                f"{wanted}, the cluster has room for {there}: no more nodes came in {waited / 60:.0f} minutes (ray.wait_minutes); the "
                "same command goes on here when they have"
            )
        if said is None or waited - said > SAY_EVERY_SECONDS:
            said = waited
            log.warning("%s, the cluster has room for %d: waits for nodes since %s", wanted, there, f"{at:%H:%M:%S}")
        time.sleep(1)
    if said is not None:
        log.warning("%s: the nodes are there after %.0f s", name, time.monotonic() - began)


def total() -> dict[str, dict[str, float]]:
    """What every living node has of each kind, when nothing runs there."""
    return {name: node["Resources"] for name, node in living().items()}


def can_never_be(status: Any, bundle: Mapping[str, float], count: int, since: int) -> bool:
    """Whether the autoscaler says that no nodes of its types can give what is asked for. Only Ray's newer one (v2) says so.

    Args:
        status: Ray's `GetClusterStatusReply`.
        bundle: that is asked for.
        count: of them.
        since: version of the cluster's state that the autoscaler has to have seen: what it says of an older one is about others.
    """
    told = status.autoscaling_state
    # Of machines that join it may know only when they have what they have.
    if told.last_seen_cluster_resource_state_version <= since or told.pending_instances or told.pending_instance_requests:
        return False
    for constraint in told.infeasible_cluster_resource_constraints:
        asked = [(dict(each.request.resources_bundle), each.count) for each in constraint.resource_requests]
        if asked == [(dict(bundle), count)]:
            return True
    return False


def _status() -> Any:
    """What the cluster has, and what its autoscaler last said of it."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    return reply


def _withdraw() -> None:
    """Asks for nothing any more: nodes that nobody works on go."""
    from ray.autoscaler.sdk import request_resources

    try:
        request_resources(bundles=[])
    except Exception as error:  # noqa: BLE001
        # No reason to stop, and not why the stage stops if it does.
        log.warning("the cluster cannot be told that no more nodes are asked for: %s", error)
