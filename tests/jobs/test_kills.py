"""A driver that is killed at any moment, and a head node that is lost: the same command ends with the same files."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import ROOT, command, content, finish, free_ports, start, wait_until_gone

KILLS = 20


def stub(tiny: Path, demonstrations: Path, root: Path, *extra: str) -> list[str]:
    """The command of the job with stubs."""
    _, _, *options = command(tiny, demonstrations, root)
    quiet = ["--evaluation.metric", "none", "--iterations.stop_when_worse", "false", "--iterations.stop_when_indistinguishable", "false"]
    return [sys.executable, "tests/support/stub_gsil.py", *options, "--iterations.count", "2", "--engine.num_cpus", "1", *quiet, *extra]


@pytest.fixture(scope="module")
def whole(tiny: Path, demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nobody stopped, and how many seconds it took behind its start."""
    root = tmp_path_factory.mktemp("whole")
    process = start(stub(tiny, demonstrations, root), root)
    while not (root / "job/base").exists():
        assert process.poll() is None
        time.sleep(0.05)
    began = time.monotonic()
    assert process.wait(timeout=400) == 0, (root / "job/logs/driver.log").read_text()
    wait_until_gone(root)
    return root / "job", time.monotonic() - began


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_driver_killed_at_twenty_random_moments(whole: tuple[Path, float], tiny: Path, demonstrations: Path, tmp_path: Path) -> None:
    undisturbed, seconds = whole
    seed = random.randrange(2**32)
    draw, kills, ends, root = random.Random(seed), 0, 0, tmp_path / "0"
    while kills < KILLS:
        process = start(stub(tiny, demonstrations, root), root)
        # From the moment on when it holds the run directory, anywhere up to what all stages take.
        while process.poll() is None and not _held_by(process.pid, root):
            time.sleep(0.001)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=draw.uniform(0, seconds))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=60)
            kills += 1
        else:
            assert process.returncode == 0, f"seed {seed}, kill {kills}: {(root / 'job/logs/driver.log').read_text()}"
            assert content(root / "job") == content(undisturbed), f"seed {seed}, kill {kills}"
            ends, root = ends + 1, tmp_path / str(ends + 1)
        wait_until_gone(tmp_path)
    done = finish(stub(tiny, demonstrations, root))
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"
    assert content(root / "job") == content(undisturbed), f"seed {seed}"
    assert not [*root.rglob(".*.tmp"), *root.rglob(".*.rows")]
    numbers = [json.loads((run / "summary.json").read_text()) for run in (root / "job", undisturbed)]
    assert all(numbers[0][key] == numbers[1][key] for key in ("policies", "final", "demonstrations"))


def _held_by(pid: int, root: Path) -> bool:
    lock = root / "job/.lock"
    return lock.exists() and f"pid {pid} " in lock.read_text()


@contextlib.contextmanager
def head(port: int, root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A head node in processes of its own."""
    folder = tempfile.mkdtemp(prefix="ray-")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    argv = [
        Path(sys.executable).parent / "ray",
        "start",
        "--head",
        f"--port={port}",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--block",
    ]
    options = {"cwd": root, "env": environment | {"GSIL_TEST": str(root)}, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*argv, f"--temp-dir={folder}"], start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_the_head_is_lost_and_the_job_given_to_another(whole: tuple[Path, float], tiny: Path, demonstrations: Path, tmp_path: Path) -> None:
    port, port_after = free_ports(2)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"GSIL_TEST": str(tmp_path)}
    with head(port, tmp_path) as first:
        argv = stub(tiny, demonstrations, tmp_path, "--ray.address", f"127.0.0.1:{port}")
        driver = _begun(argv, environment, tmp_path / "job/logs/job.log")
        while not any((tmp_path / "job/sft/samples").glob("*/*.parquet")):
            assert driver.poll() is None, (tmp_path / "job/logs/driver.log").read_text()
            time.sleep(0.01)
        os.killpg(first.pid, signal.SIGKILL)
        # Ray ends a driver that finds its head no more.
        assert driver.wait(timeout=120) != 0
    wait_until_gone(tmp_path, 60)
    with head(port_after, tmp_path):
        argv = stub(tiny, demonstrations, tmp_path, "--ray.address", f"127.0.0.1:{port_after}")
        driver = _begun(argv, environment, tmp_path / "job/logs/job.log")
        assert driver.wait(timeout=400) == 0, (tmp_path / "job/logs/driver.log").read_text()
        assert content(tmp_path / "job") == content(whole[0])
    wait_until_gone(tmp_path, 60)


def _begun(argv: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """The job, as soon as it says something of its stages. A head that starts does not answer at once."""

    def said() -> int:
        return log.read_text().count(" pipelines.watching.terminal: ") if log.exists() else 0

    before, deadline = said(), time.monotonic() + 120
    while time.monotonic() < deadline:
        process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if said() > before:
                return process
            time.sleep(0.05)
        time.sleep(1)
    raise AssertionError(log.read_text())
