"""The Ray cluster of a job: a running one, or a local instance that ends with the job."""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipelines.artifacts import StageError
from pipelines.settings import RaySettings

log = logging.getLogger(__name__)
ANSWER_SECONDS = 10.0
"""in which a cluster takes a connection"""
LOOK_SECONDS = 5.0
"""between two looks at which nodes there are"""


@contextlib.contextmanager
def connected(settings: RaySettings) -> Iterator[str]:
    """Connects for the length of the block.

    Yields:
        where the logs of Ray, vLLM and DeepSpeed are.

    Raises:
        StageError: no cluster answers at the address.
    """
    import ray.data

    address = settings.address or os.environ.get("RAY_ADDRESS")
    # Ray Data draws bars of its own; the job has one display.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    options = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address:
        _check_answers(address)
    try:
        if address:
            ray.init(address=address, **options)
        else:
            ray.init(address="local", num_cpus=settings.num_cpus, include_dashboard=False, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise StageError(f"no Ray cluster answers at {address!r}: {error}") from None
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        _to_files_only("ray.data", "ray.train")
        with _watching_nodes() if address else contextlib.nullcontext():
            yield str(Path(ray._private.worker._global_node.get_session_dir_path()) / "logs")
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _watching_nodes() -> Iterator[None]:
    """Logs, for the length of the block, which nodes join and which are gone."""
    import ray

    over = threading.Event()

    def alive() -> dict[str, str]:
        return {
            node["NodeID"]: f"node {node['NodeManagerHostname']} ({node['NodeID'][:8]}, {node['Resources'].get('CPU', 0):g} CPUs, "
            f"{node['Resources'].get('GPU', 0):g} GPUs)"
            for node in ray.nodes()
            if node["Alive"]
        }

    def watch(known: dict[str, str]) -> None:
        while not over.wait(LOOK_SECONDS):
            try:
                now = alive()
            except Exception as error:  # noqa: BLE001
                # The head does not answer: Ray ends the job if it stays so.
                log.warning("the cluster cannot be asked for its nodes: %s", error)
                continue
            for node in sorted(now.keys() - known.keys()):
                log.info("%s joined the cluster", now[node])
            for node in sorted(known.keys() - now.keys()):
                log.warning("%s is gone: what ran there starts again where there is room", known[node])
            known = now

    threading.Thread(target=watch, args=(alive(),), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes for a cluster that is not there, and says nothing."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
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


def check_fits(address: str | None, demands: Mapping[str, tuple[float, float]]) -> None:
    """Stops before a local instance would wait for ever for CPUs or GPUs that it does not have.

    Args:
        address: of a running cluster, which may grow: there it is a warning.
        demands: least (CPUs, GPUs) that must be free at one time, by the setting that asks for them.

    Raises:
        StageError: one of them is more than there is.
    """
    import ray

    may_grow = bool(address or os.environ.get("RAY_ADDRESS"))
    has = ray.cluster_resources()
    for setting, (cpus, gpus) in demands.items():
        for kind, asked in (("CPU", cpus), ("GPU", gpus)):
            here = has.get(kind, 0)
            if asked > here and may_grow:
                log.warning("%s asks for %g %ss at once, the cluster has %g now: the stage waits for more", setting, asked, kind, here)
            elif asked > here:
                mend = "lower it, or raise ray.num_cpus" if kind == "CPU" else "lower it, or run on a machine that has them"
                raise StageError(f"{setting} asks for {asked:g} {kind}s at once, this machine has {here:g}: {mend}")
