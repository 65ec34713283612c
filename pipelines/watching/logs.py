"""The log of a job: job.log for people, job.jsonl for programs; every record says which run, stage and iteration it belongs to.

logs/job.log     2026-11-22 09:23:48,298 WARNING gsil [quickstart iteration-1/pairs]: ...
logs/job.jsonl   {"time": ..., "level", "logger", "run", "stage", "iteration", "message", "exception"}
"""

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from pipelines.watching.watch import iteration, title

OURS = ("gsil", "pipelines", "actors", "jobs")
LINE = "%(asctime)s %(levelname)s %(name)s [%(where)s]: %(message)s"


class Where(logging.Filter):
    """Puts run, stage and iteration on every record.

    Args:
        run: name of the run.
        running: names of the stages that run.
    """

    def __init__(self, run: str, running: Callable[[], tuple[str, ...]]):
        super().__init__()
        self.run, self.running = run, running

    def filter(self, record: logging.LogRecord) -> bool:
        """Keeps them all."""
        stages = self.running()
        record.run, record.stage, record.iteration = self.run, title(stages) or None, iteration(stages)
        record.where = " ".join([self.run, *([title(stages)] if stages else [])])
        return True


class JsonLines(logging.Formatter):
    """A record as one JSON object on a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            **{key: getattr(record, key, None) for key in ("run", "stage", "iteration")},
            "message": record.getMessage(),
            "exception": self.formatException(record.exc_info) if record.exc_info else None,
        }
        return json.dumps(told, ensure_ascii=False)


def set_up_logs(folder: Path, where: Where, say: Callable[[str], None]) -> None:
    """The whole log to files, warnings of ours also to a person.

    Args:
        folder: of the files.
        where: is it on.
        say: tells a person.
    """

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"  {record.levelname.lower()}: {record.getMessage()}")

    folder.mkdir(parents=True, exist_ok=True)
    readable, lines = (logging.FileHandler(folder / name, encoding="utf-8") for name in ("job.log", "job.jsonl"))
    readable.setFormatter(logging.Formatter(LINE))
    lines.setFormatter(JsonLines())
    for file in (readable, lines):
        # On handlers: a logger's filter is not asked about the records of loggers below it.
        file.addFilter(where)
    shown = Lines(logging.WARNING)
    # Ours only: libraries warn about themselves.
    shown.addFilter(lambda record: record.name.split(".")[0] in OURS)
    logging.basicConfig(level=logging.INFO, handlers=[readable, lines, shown], force=True)
