"""Services for tests: processes of `jobs/serve_bon.py`, and of our application with models that cost nothing."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from running import ROOT, free_ports


@contextlib.contextmanager
def service(folder: Path, *argv: Any, module: str = "jobs/serve_bon.py") -> Iterator[str]:
    """A service in a process of its own; its URL, once it is ready."""
    (port,) = free_ports(1)
    with listening(folder, [sys.executable, module, "--server.port", str(port), *(str(word) for word in argv)], port) as url:
        yield url


@contextlib.contextmanager
def listening(folder: Path, command: Sequence[str], port: int) -> Iterator[str]:
    """A process that serves at a port; its URL, once it is ready."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = inherited | {"GSIL_TEST": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    log = folder / f"service-{port}.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        try:
            wait_until_ready(process, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


@contextlib.contextmanager
def over_http(app: Any) -> Iterator[str]:
    """An ASGI application in a thread of this process; its URL."""
    (port,) = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


def wait_until_ready(process: "subprocess.Popen[bytes]", port: int, log: Path, seconds: float = 180) -> None:
    """Waits for 200 on /health."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.3)


def replicas_of(folder: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """Process ids of a service's replicas, by a part of their names."""
    found: dict[str, list[int]] = {name: [] for name in names}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if f"GSIL_TEST={folder}".encode() in (entry / "environ").read_bytes():
                title = (entry / "cmdline").read_bytes().decode(errors="replace")
                for name in names:
                    if "ServeReplica:" in title and f":{name}" in title:
                        found[name].append(int(entry.name))
    return found
