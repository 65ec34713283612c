"""The two commands: what make installs, for whom, and that it installs it once."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_lock_file_names_versions_and_no_place(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==\S+( ;.*)?", line) for line in lines if line and not line.lstrip().startswith("#"))
    assert not [line for line in lines if re.search(r"(file|https?)://", line)]


# The locks are resolved for 3.11; what a package asks for only on 3.12 is not in them by itself.
@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_lock_holds_for_every_python(device: str, python: str, tmp_path: Path) -> None:
    pins = [line for line in (ROOT / f"requirements/{device}.txt").read_text().splitlines() if "==" in line and line[0] not in " #"]
    # torch's CPU build is on an index of its own.
    pins = [pin for pin in pins if "+cpu" not in pin]
    (tmp_path / "lock.txt").write_text("\n".join(pins))
    (tmp_path / "without.txt").write_text("torch; sys_platform == 'never'\n" if device == "cpu" else "")
    uv = str(ROOT / ".venv/bin/uv") if (ROOT / ".venv/bin/uv").exists() else shutil.which("uv")
    if uv is None:
        pytest.skip("there is no uv")
    resolve = [uv, "pip", "compile", "lock.txt", "--override", "without.txt", "--python-version", python, "--no-annotate", "--no-header"]
    resolve += ["--python-platform", "x86_64-manylinux_2_28", "--no-emit-index-url", "--no-emit-find-links", "--quiet"]
    # Where the project's own overrides are.
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    done = subprocess.run(resolve, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == sorted([*pins, ""]), "nothing is missing on this Python"


def make(*arguments: str, path: str = os.environ["PATH"]) -> str:
    """What make would do."""
    # Not what the make above it was given.
    above = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "DEVICE"}
    environment = {k: v for k, v in os.environ.items() if k not in above} | {"PATH": path}
    return subprocess.run(["make", "-n", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("answers", "given", "device"), [(True, [], "gpu"), (False, [], "cpu"), (True, ["DEVICE=cpu"], "cpu"), (False, ["DEVICE=gpu"], "gpu")]
)
def test_a_gpu_is_taken_where_its_driver_answers_or_by_name(answers: bool, given: list[str], device: str, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nexit {int(not answers)}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    # A venv elsewhere, so that nothing counts as set up.
    said = make("run", f"VENV={tmp_path}/venv", *given, path=f"{tmp_path}:{os.environ['PATH']}")
    assert f"requirements/{device}.txt" in said and ("one_gpu.yaml" in said) == (device == "gpu")


def test_what_is_set_up_is_installed_anew_only_for_another_lock(tmp_path: Path) -> None:
    def would(device: str) -> str:
        return make("setup", f"DEVICE={device}", f"VENV={tmp_path}")

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/uv").touch()
    assert would("cpu").count("pip install") == 3
    (tmp_path / "ready-cpu").touch()
    assert "install" not in would("cpu"), "as it is"
    os.utime(tmp_path / "ready-cpu", (0, 0))
    assert "-r requirements/cpu.txt" in would("cpu"), "the lock is newer than what is set up"
    (tmp_path / "ready-cpu").touch()
    assert "is set up for another device" in would("gpu") and "-r requirements/gpu.txt" in would("gpu")
