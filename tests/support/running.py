"""Runs of the whole job as a person starts them: the command, what it made, what is left of it."""

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]


def command(model: Path, data: Path, root: Path, *extra: str) -> list[str]:
    options = {
        "run.name": "job",
        "run.root": root,
        "ray.num_cpus": 6,
        "model.path": model,
        "demonstrations.path": data,
        "demonstrations.held_out_fraction": 0.4,
        "demonstrations.max_rejected_fraction": 0.1,
        "demonstrations.shard_rows": 8,
        "demonstrations.max_prompt_tokens": 96,
        "demonstrations.max_tokens": 160,
        "sft.epochs": 1,
        "sft.learning_rate": 1e-3,
        "training.learning_rate": 1e-3,
        "iterations.count": 1,
        "negatives.max_new_tokens": 24,
        "evaluation.max_new_tokens": 24,
        "engine.num_cpus": 2,
        "engine.kv_cache_gib": 0.1,
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return [sys.executable, "jobs/gsil_iterative.py", *flags, *extra]


def finish(argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=ROOT, text=True, capture_output=True, timeout=400, **options)


def content(run: Path) -> dict[str, Any]:
    """What a run made: rows of parquet, bytes of weights and scores, and every file of a policy."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if path.suffix == ".parquet":
            found[name] = pq.read_table(path).to_pylist()
        elif path.suffix == ".safetensors" or path.name == "held_out.json" or {"policy", "tokenizer", "final"} & set(path.parts):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own: they hold no model and end by themselves a minute after their raylet was killed."""


def ours_alive(root: Path) -> list[str]:
    """Processes of a run: the driver, Ray's node, engines, workers."""
    return list(processes(root).values())


def processes(root: Path) -> dict[int, str]:
    """Those of a run by their environment: process id -> command."""
    alive = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
                environment = (entry / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if f"GSIL_TEST={root}" in environment and words and not words.startswith(RAY_AGENTS):
                alive[int(entry.name)] = words.replace("\0", " ")[:120]
    return alive


def wait_until_gone(root: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while left := ours_alive(root):
        assert time.monotonic() < deadline, f"still alive: {left}"
        time.sleep(0.5)


def start(argv: list[str], root: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, cwd=ROOT, env=os.environ | {"GSIL_TEST": str(root)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of one node, as `ray start` makes it."""

    root: Path
    address: str
    dashboard: str
    environment: dict[str, str]
    files: str
    """the directory of its sessions: logs of what ran on it are below"""

    def submit(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of this repository, also while the cluster is starting."""
        ray = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", self.dashboard, "--working-dir", "."]
        deadline = time.monotonic() + 180
        while True:
            done = finish([*ray, *words], env=self.environment, **options)
            # The job server answers before it has found its agent: both come up some seconds after the head node.
            starting = any(text in done.stderr for text in ("Failed to connect", "No available agent"))
            if not starting or time.monotonic() > deadline:
                return done
            time.sleep(2)


@contextlib.contextmanager
def cluster(root: Path) -> Iterator[Cluster]:
    """Its processes belong to `root`, see `ours_alive`."""
    # A local instance that ran in this process before leaves variables behind that are not meant for another cluster.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = inherited | {"RAY_AUTH_MODE": "disabled", "GSIL_TEST": str(root)}
    port, dashboard, agent = free_ports(3)
    head = [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}"]
    # Jobs are submitted through the agent; those of other local instances hold its default port.
    head += ["--num-cpus=2", "--block", f"--dashboard-agent-listen-port={agent}"]
    # Paths of Unix sockets are short: not below pytest's folders.
    temporary = tempfile.mkdtemp(prefix="ray-")
    process = subprocess.Popen(
        [*head, f"--temp-dir={temporary}"], cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield Cluster(root, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment, temporary)
    finally:
        # `ray start --block` takes half a minute to end its own processes.
        for found in processes(root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(found, signal.SIGKILL)
        process.wait(timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)
    wait_until_gone(root)


def stop_when(process: subprocess.Popen[bytes], condition: Callable[[], bool], how: signal.Signals) -> None:
    while process.poll() is None and not condition():
        # Evaluations are over within milliseconds: a kill has to come before the stage after them.
        time.sleep(0.001)
    assert process.poll() is None, "the job ended before it could be stopped"
    process.send_signal(how)
    process.wait(timeout=60)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of a folder of shards."""
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Acts in the background as soon as `condition` holds."""

    def wait() -> None:
        while not condition():
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread
