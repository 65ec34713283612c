"""Which models a service has, and how a cluster is told of it. Imports nothing heavy."""

import json
from pathlib import Path
from typing import TypeVar

import yaml

from pipelines.run.artifacts import StageError
from pipelines.serving import edge
from pipelines.serving.settings import ServiceConfig

C = TypeVar("C", bound=ServiceConfig)


def of_run(config: C) -> C:
    """The config with the models of `server.run`, where it names none itself.

    Raises:
        StageError: there is no such run, or it has no model.
    """
    if config.server.run is None:
        return config
    run = Path(config.server.run).expanduser().resolve()
    if not (run / "logs").is_dir():
        raise StageError(f"server.run={config.server.run!r} is no run directory: there is nothing of a run in {run}")
    found = [path for path in sorted(run.glob("rewards/*/seed-*/reward")) if (path.parent / "manifest.json").exists()]
    kinds = [path.parents[1].name for path in found]
    names = [kind if kinds.count(kind) == 1 else f"{kind}-{path.parent.name}" for kind, path in zip(kinds, found, strict=True)]
    rewards = {name: str(path) for name, path in zip(names, found, strict=True)}
    sft = run / "sft/training"
    policies = [*([run / "final"] if (run / "final").is_dir() else []), *([sft / "policy"] if (sft / "manifest.json").exists() else [])]
    update = {
        "reward": config.reward.model_copy(update={"models": config.reward.models or rewards}),
        "policy": config.policy.model_copy(update={"path": config.policy.path or (str(policies[0]) if policies else None)}),
    }
    if not update["reward"].models and not update["policy"].path:  # type: ignore[attr-defined]
        raise StageError(f"{run} has no finished reward model and no policy: let its job end first")
    return type(config).model_validate(config.model_copy(update=update).model_dump())


def environment(config: ServiceConfig) -> dict[str, str]:
    """Environment variables of a cluster's nodes, for the edge of the service in the proxies."""
    return edge.CALLBACK | {edge.LIMIT: str(config.limits.body_bytes)}


def serve_config(config: ServiceConfig) -> str:
    """YAML for `serve run`, `serve deploy` and a RayService of KubeRay, and above it what their nodes need. No key is in it."""
    args = json.loads(config.model_dump_json(include=set(ServiceConfig.model_fields)))
    keys = [config.server.api_keys_env, *([config.judge.url_key_env] if config.judge.url else [])]
    head = [
        "Environment of every node, before Ray starts there:",
        *(f"  {name}={value}" for name, value in environment(config).items()),
        *(f"  {name}: a secret" for name in keys),
        "http_options.host and args.server.host say the same: on Kubernetes 0.0.0.0, and then the keys are needed.",
    ]
    return "".join(f"# {line}\n" for line in head) + yaml.safe_dump(
        {
            "proxy_location": "EveryNode",
            "http_options": {"host": config.server.host, "port": config.server.port},
            "applications": [
                {"name": config.server.name, "route_prefix": "/", "import_path": "pipelines.serving.application:build", "args": args}
            ],
        },
        sort_keys=False,
    )
