"""A job under `ray job submit` against a running cluster, and by its address; what Ray's dashboard shows of it."""

import json
import shutil
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, Cluster, cluster, command, content, finish, ours_alive

from pipelines.watching.status import ENDED, look

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


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster for the tests of this file; nothing of it is left behind them."""
    with cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found


def test_a_job_submitted_to_a_running_cluster(
    running: Cluster, undisturbed: Path, tiny: Path, demonstrations: Path, tmp_path: Path
) -> None:
    again = {"sft/training", "iteration-1/negatives"}
    # A part of a finished run has to be made again there.
    shutil.copytree(undisturbed, tmp_path / "job")
    for name in again:
        shutil.rmtree(tmp_path / "job" / name)
    job = command(tiny, demonstrations, tmp_path)
    done = running.submit("--", *job)
    assert done.returncode == 0, done.stdout + done.stderr
    here = f"DeepSpeed: {running.files}/session_"
    assert here in done.stdout, "it took the cluster that it was submitted to, and no instance of its own"
    stages = json.loads((tmp_path / "job" / "summary.json").read_text())["stages"]
    assert {stage["name"] for stage in stages if not stage["skipped"]} == again and content(tmp_path / "job") == content(undisturbed)
    # The same job by hand, told where the cluster is: all of it is done already.
    done = finish([*job, "--ray.address", running.address], env=running.environment)
    assert done.returncode == 0 and here in done.stdout, done.stdout + done.stderr
    assert all(stage["skipped"] for stage in json.loads((tmp_path / "job" / "summary.json").read_text())["stages"])
    deadline = time.monotonic() + 30
    while left := held(running):
        assert time.monotonic() < deadline, f"left on the cluster: {left}"
        time.sleep(0.5)


def asked(running: Cluster, path: str) -> Any:
    """The dashboard's answer."""
    return json.loads(urllib.request.urlopen(f"{running.dashboard}{path}", timeout=20).read())


def stub(running: Cluster, root: Path, seconds: float, *options: str) -> None:
    """Submits the stub of a job, whose every step takes some seconds."""
    environment = json.dumps({"env_vars": {"GSIL_STUB_SECONDS": str(seconds)}})
    job = [sys.executable, str(ROOT / "tests" / "support" / "stub_job.py"), "--run.root", str(root), "--run.name", "stub"]
    done = running.submit(*options, "--runtime-env-json", environment, "--", *job)
    assert done.returncode == 0, done.stdout + done.stderr


def held(running: Cluster) -> list[str]:
    """Processes of ours on the cluster."""
    return [words for words in ours_alive(running.root) if any(name in words for name in ("MapWorker", "RayTrainWorker", "stub_job.py"))]


@pytest.mark.slow
def test_ray_job_stop_ends_everything_and_the_job_submitted_again_goes_on(running: Cluster, tmp_path: Path) -> None:
    stub(running, tmp_path, 0.5, "--submission-id", "stopped", "--no-wait")
    made = tmp_path / "stub/iteration-1/negatives/train/3.txt"
    deadline = time.monotonic() + 120
    while not made.exists():
        assert time.monotonic() < deadline, asked(running, "/api/jobs/stopped/logs")
        time.sleep(0.1)
    stop = [str(Path(sys.executable).parent / "ray"), "job", "stop", "--address", running.dashboard, "stopped"]
    done = finish(stop, env=running.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert asked(running, "/api/jobs/stopped")["status"] == "STOPPED"
    deadline = time.monotonic() + 30
    while left := held(running):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    before = made.stat().st_mtime_ns
    assert "interrupted" in (tmp_path / "stub/logs/job.log").read_text()
    stub(running, tmp_path, 0.0)
    (found,) = look(tmp_path / "stub")
    assert found.state == ENDED and made.stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_dashboard_shows_the_stage_of_a_job_and_its_actors_by_name(running: Cluster, tmp_path: Path) -> None:
    stub(running, tmp_path, 0.4, "--submission-id", "watched", "--metadata-json", '{"team": "blue"}', "--no-wait")
    metadata: list[dict[str, str]] = []
    classes: set[str] = set()
    deadline = time.monotonic() + 180
    while (job := asked(running, "/api/jobs/watched"))["status"] in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline, job
        metadata.append(job["metadata"])
        classes |= {actor["class_name"] for actor in asked(running, "/api/v0/actors?limit=100")["data"]["result"]["result"]}
        time.sleep(0.3)
    assert job["status"] == "SUCCEEDED", (job, asked(running, "/api/jobs/watched/logs"))
    last = {"gsil_run": "stub", "gsil_stage": "iteration-2/training", "gsil_progress": "done"}
    assert job["metadata"] == {"team": "blue"} | last
    seen = {told["gsil_stage"] for told in metadata if "gsil_stage" in told}
    assert {"iteration-1/negatives", "iteration-1/training", "iteration-2/negatives"} <= seen, metadata
    assert "MapWorker(MapBatches(SampleShards: stub))" in classes, classes
    (found,) = look(tmp_path / "stub")
    assert found.state == ENDED and [stage.state for stage in found.stages] == ["done"] * 5
    lines = [json.loads(line) for line in (tmp_path / "stub/logs/job.jsonl").read_text().splitlines()]
    begun = [(line["run"], line["stage"], line["iteration"]) for line in lines if line["message"].startswith("started: ")]
    assert begun == [("stub", stage.name, int(stage.name[10]) if "/" in stage.name else None) for stage in found.stages]
