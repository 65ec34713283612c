"""Serve reward models, Best-of-N and a judge over HTTP, on Ray Serve.

    python jobs/serve_bon.py --run runs/irl [--judge.path policy] [--section.key value ...] [--dry-run] [--export serve_config.yaml]

    clients --> gateway --> reward models      POST /classify /score /rerank /get_reward
                        --> policy             POST /v1/chat/completions /v1/completions, with best_of_n
                        --> judge              POST /v1/judge
                                               GET  / /docs /v1/models /health /metrics

A service of the same server.name that already runs on the cluster (--ray.address, RAY_ADDRESS) is updated: the old models answer until the
new ones are ready.
On a cluster of its own the job stays until Ctrl-C or SIGTERM, and ends when the requests under way are answered, or at the second one; on a
running one (--ray.address, RAY_ADDRESS) the service stays and the job ends.
--export writes what `serve run`, `serve deploy` and KubeRay's RayService take.
"""

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from jobs.config import parse, to_yaml
from jobs.schemas import ServeConfig
from pipelines.run.artifacts import StageError
from pipelines.serving import models


def main(argv: list[str]) -> int:
    """Runs the job; returns the exit status."""
    short = {"--no-auth": "--server.no_auth=true", "--run": "--server.run"}
    update = ["python", "jobs/serve_bon.py", *argv, "--ray.address"]
    words = [word.partition("=") for word in argv]
    export, argv = _option(["".join((short.get(flag, flag), *rest)) for flag, *rest in words], "--export")
    asked = parse(ServeConfig, argv, __doc__ or "")
    try:
        config = models.of_run(asked.config)
        if export:
            Path(export).write_text(models.serve_config(config), encoding="utf-8")
            print(f"{export}: serve run {export}, serve deploy {export}, or spec.serveConfigV2 of a RayService")
        if asked.dry_run:
            print(to_yaml(config))
        if not export and not asked.dry_run:
            _serve(config, update)
        return 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """A flag that is no setting, and the rest."""
    for number, word in enumerate(argv):
        if word.startswith(f"{name}="):
            return word.partition("=")[2], argv[:number] + argv[number + 1 :]
        if word == name:
            if number + 1 == len(argv):
                sys.exit(f"error: {name} needs a file name")
            return argv[number + 1], argv[:number] + argv[number + 2 :]
    return None, argv


def _serve(config: ServeConfig, update: list[str]) -> None:
    """Starts the service and stays, where it is one of its own.

    Args:
        config: of the service.
        update: the command that updates it later, but for the address of its cluster.
    """
    import ray

    from pipelines.serving import start
    from pipelines.workers import cluster

    stays = config.ray.address or os.environ.get("RAY_ADDRESS")
    if not stays:
        start.check_port(config.server.host, config.server.port)
    # Before a cluster is started for what cannot be served.
    start.planned(config)
    # The processes of a local instance inherit it.
    os.environ |= models.environment(config)
    with cluster.connected(config.ray) as logs:
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, signal.default_int_handler)
        print(f"logs: {logs}/serve", flush=True)
        start.start(config, told=_tell)
        url = f"http://{config.server.host}:{config.server.port}"
        print(f"ready: {url} (a page to try it), {url}/docs (the API)", flush=True)
        if not stays:
            address = ray.get_runtime_context().gcs_address
            print(f"to update it: RAY_AUTH_MODE=token {shlex.join([*update, address])}", flush=True)
            start.stay(config.server)


def _tell(states: dict[str, Any]) -> None:
    print("  ".join(f"{name}: {state}" for name, state in states.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
