"""Connecting to a cluster that is not there, or cannot be, and the end of watching one that is."""

import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.run.artifacts import StageError
from pipelines.settings import RaySettings
from pipelines.workers import cluster

CLIENT = RaySettings(address="ray://head:10001")


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with (
        pytest.raises(StageError, match=f"no Ray cluster answers at '127.0.0.1:{port}'"),
        cluster.connected(RaySettings(address=f"127.0.0.1:{port}")),
    ):
        pass
    assert time.monotonic() - started < 5


def test_ray_client_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(StageError, match=r"ray://head:10001.*ray job submit.*--ray.address HOST:6379"), cluster.connected(CLIENT):
        pass


def test_a_local_instance_that_does_not_start_says_why_and_what_to_do(tmp_path: Path) -> None:
    probe = (
        "from pipelines.run.artifacts import StageError\nfrom pipelines.settings import RaySettings\n"
        "from pipelines.workers import cluster\n"
        "try:\n    with cluster.connected(RaySettings(num_cpus=1)): print('it runs')\n"
        "except StageError as error: print(error)\n"
    )
    folder = tmp_path / ("long" * 30)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"RAY_TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=False)
    said = re.escape(f"Its files and logs are in {folder}/ray (another place: RAY_TMPDIR")
    assert re.search(f"^a local Ray instance does not start: .*107 bytes.*{said}.*ray.address$", done.stdout), done.stdout + done.stderr


def test_nobody_asks_for_nodes_when_the_connection_ends(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    connection, asking = threading.Event(), threading.Event()
    connection.set()

    def nodes() -> list[object]:
        if threading.current_thread() is not threading.main_thread():
            asking.set()
            time.sleep(0.5)
        if not connection.is_set():
            raise ConnectionError("Ray is gone")
        return []

    monkeypatch.setattr("ray.nodes", nodes)
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING), cluster._watching_nodes():
        watchers = [thread for thread in threading.enumerate() if "watch" in thread.name]
        assert asking.wait(5) and len(watchers) == 1
    connection.clear()
    time.sleep(0.7)
    assert not watchers[0].is_alive() and not caplog.text


INTERRUPTED = """
import threading, time
import ray
from pipelines.workers import cluster
from pipelines.run.keeping import WAITS_FOR_ACTORS
from pipelines.settings import RaySettings

@ray.remote
class Sleeper:
    def sleep(self): time.sleep(600)
    def awake(self): return True

def wait(actor):
    try: ray.get(actor.sleep.remote())
    except ray.exceptions.RayActorError: print("the thread is free")

ray.shutdown, end = (lambda: None), ray.shutdown
try:
    with cluster.connected(RaySettings(num_cpus=2)):
        own, service = Sleeper.remote(), Sleeper.options(name="service", lifetime="detached").remote()
        ray.get([own.awake.remote(), service.awake.remote()])
        waiting = threading.Thread(target=wait, args=(own,), name=WAITS_FOR_ACTORS, daemon=True)
        waiting.start()
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print("interrupted", waiting.is_alive(), ray.get(service.awake.remote()))
end()
"""


def test_who_interrupts_waits_for_no_actor_and_leaves_services_alone() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.splitlines()[-2:] == ["the thread is free", "interrupted False True"], done.stdout + done.stderr
