"""The application on Ray Serve: a gateway before reward models, a policy and a judge, each a deployment of its own.

clients --HTTP--> proxy --> gateway --> reward-NAME (one deployment a reward model)
                                    --> policy
                                    --> judge
"""

import asyncio
import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from huggingface_hub import list_repo_files, try_to_load_from_cache
from ray import serve
from ray.serve.context import _get_global_client

from actors.generator import environment
from pipelines import base_model
from pipelines.run.artifacts import StageError, read_json
from pipelines.scoring import check_one_label
from pipelines.serving.rewards import RewardReplica
from pipelines.serving.samples import PolicyReplica
from pipelines.serving.settings import Replicas, Server, ServiceConfig

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CLOSED = "closed"
"""file in the folder of a service that ends"""
STATUS_SECONDS = 1.0
"""how long the controller's word on the deployments' state is believed"""


def build(args: dict[str, Any]) -> Any:
    """The application out of a `ServiceConfig`'s values; `serve run` and `serve deploy` call it, too.

    Raises:
        StageError: nothing is to be served, a model cannot be, or keys are needed and there are none.
    """
    config = ServiceConfig.model_validate(args)
    keys = digests(config.server)
    templates = config.judge.templates
    if templates and not Path(templates).is_dir():
        raise StageError(f"judge.templates={templates!r} is no folder")
    if not (config.reward.models or has_policy(config) or config.judge.path or config.judge.url):
        raise StageError("nothing to serve: name reward.models, policy.path, judge.path or judge.url, or a run")
    patience = config.server.request_timeout
    rewards = {}
    for name, path in config.reward.models.items():
        weights = checked_weights(path, config.server)
        # A directory says so before a process loads it.
        if found := read_json(Path(weights) / "config.json"):
            check_one_label(found, f"reward.models.{name}={weights}")
        bound = _deployed(RewardReplica, f"reward-{name}", config.reward, patience, environment(config.reward))
        rewards[name] = bound.bind(
            name, weights, config.reward, config.reward.precision, config.reward.max_model_len, *_trust(config.server)
        )
    policy = None
    if has_policy(config):
        assert config.policy.path
        policy = _deployed(PolicyReplica, "policy", config.policy, patience, environment(config.policy)).bind(
            config.policy.name,
            checked_weights(config.policy.path, config.server),
            config.policy,
            config.policy.max_model_len,
            config.limits.max_new_tokens,
            *_trust(config.server),
        )
    gateway = _deployed(GatewayReplica, "gateway", config.gateway, patience)
    return gateway.bind(config, keys, rewards, policy, _judge(config, policy))


def has_policy(config: ServiceConfig) -> bool:
    """Whether a policy is served."""
    return config.policy.path not in (None, "none")


def _judge(config: ServiceConfig, policy: Any) -> Any:
    judge = config.judge
    if judge.path is None:
        return None
    if judge.path == "policy":
        if policy is None:
            raise StageError("judge.path=policy, but this service has no policy: name policy.path, or another judge")
        return policy
    deployed = _deployed(PolicyReplica, "judge", judge, config.server.request_timeout, environment(judge))
    weights = checked_weights(judge.path, config.server)
    return deployed.bind(judge.name, weights, judge, judge.max_model_len, judge.max_new_tokens, *_trust(config.server))


def _trust(server: Server) -> tuple[bool, bool]:
    """Whether a model's own code runs, and whether files that may run code are left alone."""
    return server.trust_remote_code, server.safetensors_only


def _deployed(replica: type, name: str, settings: Replicas, patience: float, environment: dict[str, str] | None = None) -> Any:
    options: dict[str, Any] = {"num_replicas": settings.min_actors}
    if settings.max_actors > settings.min_actors:
        options = {
            "autoscaling_config": {
                "min_replicas": settings.min_actors,
                "max_replicas": settings.max_actors,
                "target_ongoing_requests": settings.target_ongoing_requests,
                "upscale_delay_s": settings.upscale_delay,
                "downscale_delay_s": settings.downscale_delay,
                # Delays of a few seconds need news that is as fresh.
                "metrics_interval_s": 2,
                "look_back_period_s": 6,
            }
        }
    actor: dict[str, Any] = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
    if environment:
        actor["runtime_env"] = {"env_vars": environment}
    return serve.deployment(
        name=name,
        ray_actor_options=actor,
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        backpressure_config={"retry_after_s": 1.0},
        health_check_period_s=2,
        health_check_timeout_s=30,
        # An update lets every request end that is under way.
        graceful_shutdown_timeout_s=patience,
        max_constructor_retry_count=2,
        # A new checkpoint takes over when it is ready, not before.
        max_surge_percent=100,
        **options,
    )(replica)


class GatewayReplica:
    """A process of the gateway.

    Args:
        config: of the service.
        keys: digests of the API keys.
        rewards: handles by name.
        policy: a handle.
        judge: a handle; None where there is none, or it has a URL.

    Raises:
        StageError: Ray Serve listens where others reach it, whatever the config says, and there are no keys.
    """

    def __init__(self, config: ServiceConfig, keys: tuple[str, ...], rewards: dict[str, Any], policy: Any, judge: Any):
        from pipelines.serving.backends import Remote
        from pipelines.serving.judging import Judge, LocalWriter, UrlWriter
        from pipelines.serving.service import RewardModels, Service

        check_closed(listening(), keys, config.server)
        self.config = config
        self.keys = keys
        aliases = {path: name for name, path in config.reward.models.items()}
        backends = {name: Remote(f"the reward model {name}", handle) for name, handle in rewards.items()}
        writers = {config.policy.name: Remote("the policy", policy)} if policy else {}
        self.judge: Judge | None = None
        if config.judge.url:
            self.judge = Judge(config.judge.name, UrlWriter(config.judge), config.judge)
        elif judge:
            # Also by its name, as any OpenAI-compatible judge: tournaments ask it so.
            writers[config.judge.name] = Remote("the judge", judge)
            self.judge = Judge(config.judge.name, LocalWriter(writers[config.judge.name]), config.judge)
        self.service = Service(writers, RewardModels(backends, config.ensemble, aliases))
        self.states: tuple[float, dict[str, str]] = 0.0, {}

    def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve takes the HTTP application from here."""
        folder = shared(self.config.server)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        from pipelines.serving.door import Access
        from pipelines.serving.gateway import build as build_app
        from pipelines.serving.metrics import Metrics

        access = Access(self.keys, self.config.server.request_timeout, folder / CLOSED)
        return build_app(self.service, self.judge, access, self.config.limits, self.ready, Metrics())

    async def ready(self) -> dict[str, str]:
        """The state of every deployment: "ready", or what Ray Serve says of it."""
        asked, states = self.states
        if time.monotonic() - asked > STATUS_SECONDS:
            try:
                states = await asyncio.to_thread(_states, serve.get_replica_context().app_name)
            except Exception as error:  # noqa: BLE001
                # Ray Serve's controller is starting anew, or Ray's head is.
                states = {"controller": f"no answer: {type(error).__name__}"}
            self.states = time.monotonic(), states
        return states


def shared(server: Server) -> Path:
    """Folder of a service's gateways on this node: what they count, and whether they still take requests."""
    folder = Path(tempfile.gettempdir(), f"gsil-metrics-{ray.get_runtime_context().get_session_name()}", server.name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _states(application: str) -> dict[str, str]:
    deployments = serve.status().applications[application].deployments
    running = {name: found.replica_states.get("RUNNING", 0) for name, found in deployments.items()}
    return {name: "ready" if running[name] else found.status.value.lower() for name, found in deployments.items()}


def digests(server: Server) -> tuple[str, ...]:
    """Digests of the API keys, which themselves stay where they are.

    Raises:
        StageError: there are none, and the address can be reached from elsewhere; or the file cannot be read.
    """
    words = os.environ.get(server.api_keys_env, "").replace(",", " ").split()
    if server.api_keys_file:
        try:
            words += Path(server.api_keys_file).expanduser().read_text(encoding="utf-8").split()
        except OSError as error:
            raise StageError(f"server.api_keys_file={server.api_keys_file!r}: {error.strerror}") from None
    if server.api_keys_file and not words:
        raise StageError(f"server.api_keys_file={server.api_keys_file!r} holds no key")
    keys = tuple(digest(word) for word in words)
    check_closed(server.host, keys, server)
    return keys


def check_closed(host: str | None, keys: tuple[str, ...], server: Server) -> None:
    """Lets nobody in from elsewhere without a key.

    Args:
        host: address that is listened at; None: at none.
        keys: digests of the API keys.
        server: says no_auth where everybody is welcome.

    Raises:
        StageError: there are none, and the address can be reached from other machines.
    """
    if not keys and host not in (None, *LOOPBACK) and not server.no_auth:
        raise StageError(
            f"the address {host} can be reached from other machines: set API keys in the environment variable "
            f"{server.api_keys_env} or in server.api_keys_file, or say --no-auth"
        )


def listening() -> str | None:
    """The address at which the proxies of this cluster listen: with `serve deploy` that is not in our config."""
    return _get_global_client().http_config.host


def digest(key: str) -> str:
    """SHA-256 of an API key."""
    return hashlib.sha256(key.encode()).hexdigest()


def checked_weights(path: str, server: Server) -> str:
    """A model's directory in full, or its hub id.

    Raises:
        StageError: there is no such model, or its weights are not in safetensors and have to be.
    """
    weights = base_model.absolute(path)
    folder = Path(weights)
    try:
        if not folder.is_dir() and isinstance(cached := try_to_load_from_cache(weights, "config.json"), str):
            folder = Path(cached).parent
        files = [file.name for file in folder.iterdir()] if folder.is_dir() else list_repo_files(weights)
    except Exception as error:  # noqa: BLE001
        # The hub's client raises a dozen kinds.
        raise StageError(f"{path!r} is no model's directory or hub id (owner/name): {str(error).splitlines()[0]}") from None
    if server.safetensors_only and not any(name.endswith(".safetensors") and "/" not in name for name in files):
        raise StageError(f"{path!r} has no weights in safetensors: server.safetensors_only=false allows other formats")
    return weights


GatewayReplica = serve.ingress()(GatewayReplica)  # type: ignore[misc]
