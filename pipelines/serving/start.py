"""Starts or updates a service on the cluster that this process is connected to."""

import logging
import time
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client

from pipelines.artifacts import StageError
from pipelines.serving import application
from pipelines.serving.settings import ServiceConfig

POLL_SECONDS = 0.5
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


def start(config: ServiceConfig, told: Callable[[dict[str, str]], None]) -> None:
    """Returns when every deployment has a process that is ready.

    Args:
        config: of the service.
        told: called with the state of every deployment when one changes.

    Raises:
        StageError: a model cannot be served; or the proxies of this cluster listen elsewhere already.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    app = application.build(config.model_dump(include=set(ServiceConfig.model_fields)))
    serve.start(proxy_location="EveryNode", http_options=HTTPOptions(host=config.server.host, port=config.server.port))
    listening = _get_global_client().http_config
    if (listening.host, listening.port) != (config.server.host, config.server.port):
        raise StageError(
            f"Ray Serve already listens at {listening.host}:{listening.port} on this cluster: give server.host and server.port "
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


def _state(deployment: Any) -> str:
    """For a person; what it waits for, CPUs for example, is in Ray Serve's message."""
    return " ".join([deployment.status.value.lower(), *([f"({deployment.message})"] if deployment.message else [])])
