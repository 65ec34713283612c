"""How often what holds a model died under a stage and was started again: a line in a file of the stage for each time.

Whoever starts again writes it, whoever shows the run counts; the two meet in the stage's directory alone.
"""

from pathlib import Path

from pipelines.run.artifacts import ATTEMPT


def restarted(directory: Path) -> None:
    """One time more.

    Args:
        directory: of the stage.
    """
    path = _file(directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(b"\n")


def restarts(directory: Path) -> int:
    """How often so far, since the stage began."""
    path = _file(directory)
    return path.stat().st_size if path.exists() else 0


def _file(directory: Path) -> Path:
    return directory / ATTEMPT / "restarts"
