"""vLLM's own server on a model of ours."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from running import free_ports


@contextlib.contextmanager
def served(model: Path, *flags: str) -> Iterator[httpx.Client]:
    """Starts what `vllm serve MODEL` starts; gives a client of it.

    The command itself looks for a package of the name vllm, and the CPU build has another: the module behind it does not.
    """
    (port,) = free_ports(1)
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "ours", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *words, "--enforce-eager", *flags], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                deadline = time.monotonic() + 200
                while True:
                    with contextlib.suppress(httpx.TransportError):
                        if client.get("/health").status_code == 200:
                            break
                    log.seek(0)
                    assert process.poll() is None and time.monotonic() < deadline, log.read()[-3000:]
                    time.sleep(0.5)
                yield client
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
