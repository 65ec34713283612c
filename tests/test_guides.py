"""What README and the guides say: links lead somewhere, commands name files and settings that are there."""

import re
import shlex
from pathlib import Path

import pytest
from running import ROOT

from jobs.config import build
from jobs.schemas import DilConfig, EvaluateConfig, GsilConfig, IrlConfig, JobConfig, ReproduceConfig, ServeConfig

GUIDES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "deploy" / "README.md", ROOT / "benchmarks" / "README.md"]
SCHEMAS: dict[str, type[JobConfig] | type[ServeConfig]] = {
    "gsil_iterative": GsilConfig,
    "dil": DilConfig,
    "irl_reward": IrlConfig,
    "evaluate": EvaluateConfig,
    "reproduce": ReproduceConfig,
    "serve_bon": ServeConfig,
}
OWN_FLAGS = {"--dry-run", "--help", "--no-auth", "--allow-code-execution"}
"""Of the command lines themselves."""


def commands(path: Path) -> list[str]:
    """The lines of a guide's shell blocks and inline commands."""
    text = path.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    inline = re.findall(r"`((?:[\w./]*python )?jobs/\w+\.py [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for block in (*blocks, *inline) for line in block.splitlines() if line.strip() and not line.startswith("#")]


def anchors(path: Path) -> set[str]:
    """What a link into a guide may name."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for name in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if "://" not in name:
            file, _, anchor = name.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), name
            assert not anchor or anchor in anchors(target), name


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_files_and_settings_that_are_there(path: Path) -> None:
    for line in commands(path):
        for name in re.findall(r"\b(?:deploy|jobs|requirements|benchmarks|tests)/[\w./-]+\w", line):
            assert (ROOT / name).exists(), line
        found = re.search(r"\bjobs/(\w+)\.py (.*)", line)
        if not found or found[1] not in SCHEMAS or "..." in line:
            continue
        words = [word for word in shlex.split(found[2], comments=True) if word not in OWN_FLAGS]
        pairs = list(zip(words[::2], words[1::2], strict=True))
        # A run that somebody made and files that a person writes are not there.
        kept = [pair for pair in pairs if pair[0] not in ("--export", "--run") and pair != ("--config", "my.yaml")]
        build(SCHEMAS[found[1]], [word for pair in kept for word in pair])


def test_the_commands_are_found() -> None:
    found = {job: sum(f"jobs/{job}.py" in line for path in GUIDES for line in commands(path)) for job in SCHEMAS}
    assert found["gsil_iterative"] >= 8 and found["evaluate"] >= 5 and found["irl_reward"] >= 5 and found["serve_bon"] >= 3, found
