"""What a service refuses before it starts: addresses without keys, weights that run code, runs without models, ports that are taken."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import stub_service
import yaml
from models import write_tiny

from jobs import serve_bon
from pipelines.run.artifacts import StageError
from pipelines.serving import application, metrics, models, start
from pipelines.serving.door import Access
from pipelines.serving.settings import JudgeService, PolicyService, RewardService, Server, ServiceConfig
from pipelines.workers import cluster


def test_an_address_that_others_reach_needs_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GSIL_API_KEYS", raising=False)
    assert application.digests(Server()) == ()
    with pytest.raises(StageError, match="GSIL_API_KEYS"):
        application.digests(Server(host="0.0.0.0"))
    assert application.digests(Server(host="0.0.0.0", no_auth=True)) == ()
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    assert application.digests(Server(host="0.0.0.0", api_keys_file=str(keys))) == (application.digest("one"), application.digest("two"))
    monkeypatch.setenv("GSIL_API_KEYS", "three, four")
    assert len(application.digests(Server(host="0.0.0.0"))) == 2
    monkeypatch.delenv("GSIL_API_KEYS")
    keys.write_text("\n")
    with pytest.raises(StageError, match="holds no key"):
        application.digests(Server(api_keys_file=str(keys)))
    with pytest.raises(StageError, match="No such file"):
        application.digests(Server(api_keys_file=str(tmp_path / "other")))


@pytest.mark.parametrize(("host", "opens"), [("0.0.0.0", False), ("10.0.0.7", False), ("127.0.0.1", True), (None, True)])
def test_where_ray_serve_listens_counts_whatever_the_config_says(host: str | None, opens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "listening", lambda: host)
    # Under what Ray Serve makes of it.
    plain = next(kind for kind in application.GatewayReplica.__mro__ if "__serve_build_asgi_app__" in vars(kind))
    config = ServiceConfig(policy=PolicyService(path="none"))
    if opens:
        plain(config, (), {}, None, None)
    else:
        with pytest.raises(StageError, match=f"{host} can be reached.*GSIL_API_KEYS"):
            plain(config, (), {}, None, None)
    plain(config, ("digest",), {}, None, None)
    plain(config.model_copy(update={"server": Server(no_auth=True)}), (), {}, None, None)


def test_weights_are_in_safetensors_unless_others_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(StageError, match="safetensors_only=false"):
        application.checked_weights(str(tmp_path), Server())
    assert application.checked_weights(str(tmp_path), Server(safetensors_only=False)) == str(tmp_path)
    with pytest.raises(StageError, match="no model's directory or hub id"):
        application.checked_weights(str(tmp_path / "nothing"), Server())


def test_what_cannot_be_served_is_said() -> None:
    with pytest.raises(StageError, match="nothing to serve"):
        application.build({})
    with pytest.raises(StageError, match=r"judge\.templates='nowhere' is no folder"):
        application.build(ServiceConfig(judge=JudgeService(templates="nowhere")).model_dump())


def test_a_judge_alone_is_a_service(tiny: Path) -> None:
    assert application.build(ServiceConfig(judge=JudgeService(path=str(tiny))).model_dump())


def test_a_policy_is_no_reward_model_and_no_cluster_is_started_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert serve_bon.main(["--reward.models", f"{{mine: {tmp_path}}}", "--server.port", str(port)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: reward.models.mine={tmp_path} is LlamaForCausalLM: a reward model is a")
    assert not ray.is_initialized()


def test_the_models_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no run directory"):
        models.of_run(ServiceConfig(server=Server(run=str(tmp_path))))
    (tmp_path / "logs").mkdir()
    with pytest.raises(StageError, match="no finished reward model"):
        models.of_run(ServiceConfig(server=Server(run=str(tmp_path))))
    for name in ("init-sft/seed-0", "bt/seed-0", "bt/seed-1"):
        (tmp_path / "rewards" / name / "reward").mkdir(parents=True)
        (tmp_path / "rewards" / name / "manifest.json").write_text("{}")
    (tmp_path / "rewards/init-demo/seed-0/reward").mkdir(parents=True)
    (tmp_path / "sft/training").mkdir(parents=True)
    (tmp_path / "sft/training/manifest.json").write_text("{}")
    found = models.of_run(ServiceConfig(server=Server(run=str(tmp_path))))
    assert list(found.reward.models) == ["bt-seed-0", "bt-seed-1", "init-sft"], "init-demo is not finished"
    assert found.policy.path == str(tmp_path / "sft/training/policy")
    (tmp_path / "final").mkdir()
    named = ServiceConfig(server=Server(run=str(tmp_path)), reward=RewardService(models={"mine": "x"}))
    assert models.of_run(named).reward.models == {"mine": "x"} and models.of_run(named).policy.path == str(tmp_path / "final")


def test_the_exported_config_says_what_nodes_need_and_holds_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSIL_API_KEYS", "sesame")
    file = tmp_path / "serve_config.yaml"
    assert serve_bon.main(["--reward.models", "{tiny: x}", "--server.host", "0.0.0.0", "--export", str(file)]) == 0
    text = file.read_text()
    assert "sesame" not in text and "# " in text and "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=" in text and "GSIL_API_KEYS" in text
    config = yaml.safe_load(text)
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000}
    assert ServiceConfig.model_validate(json.loads(json.dumps(config["applications"][0]["args"]))).reward.models == {"tiny": "x"}


def test_a_port_that_another_service_has_is_not_shared() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StageError, match=r"somebody listens at 127\.0\.0\.1"):
            start.check_port("127.0.0.1", port)
    start.check_port("127.0.0.1", port)


def test_whoever_ends_waits_for_what_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
import time
from pipelines.serving.metrics import Metrics
metrics = Metrics()
metrics.came()
print("under way", flush=True)
time.sleep(2)
metrics.answered("/classify", 200, 2.0)
time.sleep(60)
"""
    monkeypatch.setattr(application, "shared", lambda server: tmp_path)
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True) as gateway:
        assert gateway.stdout and gateway.stdout.readline() == "under way\n" and metrics.running(tmp_path) == 1
        monkeypatch.setattr(start.time, "sleep", _interrupted(start.time.sleep))
        with pytest.raises(KeyboardInterrupt):
            start.stay(Server())
        assert (tmp_path / application.CLOSED).exists() and metrics.running(tmp_path) == 0
        assert gateway.poll() is None
        gateway.kill()


def _interrupted(sleep: Callable[[float], None]) -> Callable[[float], None]:
    def once(seconds: float) -> None:
        if seconds == 1:
            raise KeyboardInterrupt
        sleep(seconds)

    return once


def test_nobody_new_comes_in_where_a_service_ends(tmp_path: Path) -> None:
    app = stub_service.application(access=Access(closed=tmp_path / "closed"))
    assert stub_service.post(app, "/classify", {"input": "a"}).status_code == 200
    (tmp_path / "closed").touch()
    answer = stub_service.post(app, "/classify", {"input": "a"})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"


def test_the_command_that_updates_a_service_can_be_copied(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(models, "environment", lambda config: {})
    monkeypatch.setattr(cluster, "connected", lambda settings: contextlib.nullcontext("logs"))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.7:6379"))
    for name in ("check_port", "planned", "start", "stay"):
        monkeypatch.setattr(start, name, lambda *_, **__: None)
    assert serve_bon.main(["--reward.models", "{tiny: x}", "--no-auth"]) == 0
    command = "RAY_AUTH_MODE=token python jobs/serve_bon.py --reward.models '{tiny: x}' --no-auth --ray.address 10.0.0.7:6379"
    assert f"to update it: {command}\n" in capsys.readouterr().out
