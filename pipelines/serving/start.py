"""Starts or updates a service on the cluster that this process is connected to."""

import errno
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client

from pipelines.run.artifacts import StageError
from pipelines.serving import application
from pipelines.serving.settings import Server, ServiceConfig

POLL_SECONDS = 0.5
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


def check_port(host: str, port: int) -> None:
    """For a service of a cluster of its own: Ray Serve shares a port that another service listens at, and answers every other request.

    Raises:
        StageError: somebody listens there.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # Connections of a service that ended a minute ago are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise StageError(f"server.host={host}, server.port={port}: {error.strerror}") from None
            raise StageError(
                f"somebody listens at {host}:{port} already: give another --server.port; or, if it is this service, update it by the "
                "command that it printed when it was ready (--ray.address)"
            ) from None


def planned(config: ServiceConfig) -> Any:
    """The application; no cluster is needed for it.

    Raises:
        StageError: it cannot be served.
    """
    return application.build(config.model_dump(include=set(ServiceConfig.model_fields)))


def start(config: ServiceConfig, told: Callable[[dict[str, str]], None]) -> None:
    """Returns when every deployment has a process that is ready.

    Args:
        config: of the service.
        told: called with the state of every deployment when one changes.

    Raises:
        StageError: a model cannot be served; or the proxies of this cluster listen elsewhere already.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    app = planned(config)
    serve.start(proxy_location="EveryNode", http_options=HTTPOptions(host=config.server.host, port=config.server.port))
    there = _get_global_client().http_config
    if (there.host, there.port) != (config.server.host, config.server.port):
        raise StageError(
            f"Ray Serve already listens at {there.host}:{there.port} on this cluster: give server.host and server.port "
            "these values, or end what is served there (serve shutdown)"
        )
    serve.run_many([serve.RunTarget(app, config.server.name, "/")], wait_for_applications_running=False)
    shown: dict[str, str] = {}
    while True:
        found = serve.status().applications[config.server.name]
        states = {name: _state(deployment) for name, deployment in found.deployments.items()}
        if states != shown:
            told(shown := states)
        if found.status.value in FAILED:
            why = [f"{name}: {d.message}" for name, d in found.deployments.items() if d.message] or [found.message]
            raise StageError("the service does not start: " + "; ".join(why))
        if found.status.value == "RUNNING":
            return
        time.sleep(POLL_SECONDS)


def stay(server: Server) -> None:
    """Until a signal comes, for a service of a cluster of its own; then until the requests under way are answered, or a second signal.

    Ray Serve would end models that have nothing to do at once, and with them the requests that the gateway was about to bring.

    Args:
        server: its name, and how long a request may take.

    Raises:
        KeyboardInterrupt: always, in the end.
    """
    from pipelines.serving.metrics import running

    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        folder = application.shared(server)
        (folder / application.CLOSED).touch()
        left, ends = running(folder), time.monotonic() + server.request_timeout
        if left:
            print(f"\n{left} requests are under way and will be answered; the next Ctrl-C or SIGTERM ends them, too", flush=True)
        while running(folder) and time.monotonic() < ends:
            time.sleep(POLL_SECONDS)
        raise


def _state(deployment: Any) -> str:
    """For a person; what it waits for, CPUs for example, is in Ray Serve's message."""
    return " ".join([deployment.status.value.lower(), *([f"({deployment.message})"] if deployment.message else [])])
