"""The house: imports point one way, and the mathematics stay free of engines."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ABOVE = {"actors": {"pipelines", "jobs"}, "pipelines": {"jobs"}, "jobs": set[str]()}
GROUND = ("run", "watching", "workers", "data", "judges", "lmeval")
"""Rooms of pipelines/ that stages share."""
ROOFS = ("report", "serving", "reproduction")
"""Rooms of pipelines/ that stand on the stages."""
LEARNER = ("objectives", "logprobs", "rewards", "rounding", "batches", "attention", "data")
MATHEMATICS = [ROOT / "actors" / "learner" / f"{name}.py" for name in LEARNER]
MATHEMATICS += [ROOT / "actors" / "reward" / f"{name}.py" for name in ("best_of_n", "metrics")]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", list(ABOVE))
def test_imports_point_from_jobs_to_pipelines_to_actors(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert not set(imported(path)) & ABOVE[room], path


def test_what_stages_share_knows_no_stage() -> None:
    stages = {path.stem for path in (ROOT / "pipelines").glob("*.py") if "Stage(" in path.read_text()} | {"base_model", *ROOFS}
    assert {"demonstrations", "generation", "reference", "policy_training", "tournament"} <= stages
    for room in GROUND:
        for path in (ROOT / "pipelines" / room).glob("*.py"):
            assert not set(of_pipelines(path)) & stages, path


def of_pipelines(path: Path) -> Iterator[str]:
    """Files and rooms of pipelines/ that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pipelines":
            yield from [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]


@pytest.mark.parametrize("path", MATHEMATICS, ids=lambda path: path.stem)
def test_the_mathematics_know_no_engine(path: Path) -> None:
    assert not set(imported(path)) & {"ray", "vllm", "deepspeed"}


def test_no_file_grows_past_one_subject() -> None:
    for room in (*ABOVE, "benchmarks", "deploy", "tests"):
        for path in (ROOT / room).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 330, path
