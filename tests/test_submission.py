"""The same job under `ray job submit` against a running cluster, and by its address."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
from running import ROOT, command, content, finish, free_ports, ours_alive, wait_until_gone

LEFT_HERE = ("runs/a/final/model.safetensors", ".venv/bin/python", "jobs/__pycache__/config.pyc", ".git/config", ".env", "wandb/run/log")


def packed(directory: Path, target: Path, include_gitignore: bool) -> list[str]:
    """What Ray itself puts into the package of a working directory."""
    from ray._private.runtime_env.packaging import create_package

    create_package(str(directory), target, include_gitignore=include_gitignore)
    with zipfile.ZipFile(target) as package:
        return [name for name in package.namelist() if not name.endswith("/")]


# Ray can be told to read no .gitignore (RAY_RUNTIME_ENV_IGNORE_GITIGNORE).
@pytest.mark.parametrize("include_gitignore", [True, False])
def test_runs_caches_and_environments_are_not_submitted(tmp_path: Path, include_gitignore: bool) -> None:
    project = tmp_path / "project"
    for name in (*LEFT_HERE, "jobs/dil.py", "my_judge.py", "data/rows.jsonl"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, project / name)
    names = packed(project, tmp_path / "package.zip", include_gitignore)
    assert sorted(names) == [".gitignore", ".rayignore", "data/rows.jsonl", "jobs/dil.py", "my_judge.py"]


def test_the_project_is_submitted_whole_and_small(tmp_path: Path) -> None:
    names = packed(ROOT, tmp_path / "package.zip", True)
    code = [str(path.relative_to(ROOT)) for room in ("actors", "pipelines", "jobs") for path in (ROOT / room).rglob("*.py")]
    assert set(code) <= set(names) and "jobs/configs/quickstart.yaml" in names and "pipelines/report/page.html" in names
    assert (tmp_path / "package.zip").stat().st_size < 2 * 2**20


def test_a_job_submitted_to_a_running_cluster(undisturbed: Path, tiny: Path, demonstrations: Path, tmp_path: Path) -> None:
    again = {"sft/training", "iteration-1/negatives"}
    binaries = Path(sys.executable).parent
    # A local instance that ran in this process before leaves variables behind that are not meant for another cluster.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = inherited | {"RAY_AUTH_MODE": "disabled", "GSIL_TEST": str(tmp_path)}
    port, dashboard, agent = free_ports(3)
    head = [str(binaries / "ray"), "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2", "--block"]
    # Jobs are submitted through the agent; those of other local instances hold its default port.
    head += [f"--dashboard-agent-listen-port={agent}"]
    # Paths of Unix sockets are short: not below pytest's folders.
    temporary = tempfile.mkdtemp(prefix="ray-")
    cluster = subprocess.Popen(
        [*head, f"--temp-dir={temporary}"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        submit = [str(binaries / "ray"), "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--working-dir", ".", "--"]
        # A part of a finished run has to be made again there.
        shutil.copytree(undisturbed, tmp_path / "job")
        for name in again:
            shutil.rmtree(tmp_path / "job" / name)
        job = command(tiny, demonstrations, tmp_path)
        deadline = time.monotonic() + 180
        while True:
            done = finish([*submit, *job], env=environment)
            # The job server answers before it has found its agent: both come up some seconds after the head node.
            starting = any(text in done.stderr for text in ("Failed to connect", "No available agent"))
            if not starting or time.monotonic() > deadline:
                break
            time.sleep(2)
        assert done.returncode == 0, done.stdout + done.stderr
        stages = json.loads((tmp_path / "job" / "summary.json").read_text())["stages"]
        assert {stage["name"] for stage in stages if not stage["skipped"]} == again and content(tmp_path / "job") == content(undisturbed)
        # The same job by hand, told where the cluster is: all of it is done already.
        done = finish([*job, "--ray.address", f"127.0.0.1:{port}"], env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert all(stage["skipped"] for stage in json.loads((tmp_path / "job" / "summary.json").read_text())["stages"])
        deadline = time.monotonic() + 30
        while held := [words for words in ours_alive(tmp_path) if any(name in words for name in ("MapWorker", "RayTrainWorker"))]:
            assert time.monotonic() < deadline, f"left on the cluster: {held}"
            time.sleep(0.5)
    finally:
        cluster.send_signal(signal.SIGTERM)
        cluster.wait(timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)
    wait_until_gone(tmp_path)
