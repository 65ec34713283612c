"""The log of a job: every record says where it was written from, for people and for programs."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.watching.logs import Where, set_up_logs

log = logging.getLogger("gsil")


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """Given back as it was."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    # Removed before pytest's handlers can be closed with them.
    logger.handlers = []
    yield logger
    for handler in logger.handlers:
        handler.close()
    logger.handlers = handlers
    logger.setLevel(level)


def test_every_record_says_run_stage_and_iteration(tmp_path: Path, root_logger: logging.Logger) -> None:
    running: list[tuple[str, ...]] = [()]
    said: list[str] = []
    set_up_logs(tmp_path, Where("mine", lambda: running[0]), said.append)
    log.info("begins")
    running[0] = ("sft/samples", "iteration-2/negatives")
    logging.getLogger("somewhere.else").warning("%d rows, ü", 3)
    running[0] = ("sft/training",)
    try:
        raise OSError("no room")
    except OSError:
        log.warning("stopped", exc_info=True)
    first, second, third = (json.loads(line) for line in (tmp_path / "job.jsonl").read_text(encoding="utf-8").splitlines())
    assert (first["run"], first["stage"], first["iteration"], first["message"]) == ("mine", None, None, "begins")
    assert first["time"].endswith("+00:00") and (first["level"], first["logger"], first["exception"]) == ("INFO", "gsil", None)
    assert (second["stage"], second["iteration"], second["message"]) == ("sft/samples + iteration-2/negatives", 2, "3 rows, ü")
    assert (third["stage"], third["iteration"]) == ("sft/training", None)
    assert third["exception"].startswith("Traceback") and third["exception"].endswith("OSError: no room")
    readable = (tmp_path / "job.log").read_text(encoding="utf-8").splitlines()
    assert readable[0].endswith(" INFO gsil [mine]: begins")
    assert readable[1].endswith(" WARNING somewhere.else [mine sft/samples + iteration-2/negatives]: 3 rows, ü")
    assert said == ["  warning: stopped"], "to a person warnings of ours alone"
