"""The display: rates, and what happens when work is taken back."""

import io
import time

import pytest
from rich.console import Console

from pipelines.artifacts import Stage
from pipelines.progress import Terminal, titled


@pytest.mark.parametrize(("total", "shown"), [(40, "5/40"), (None, "5/?")])
def test_a_terminal_shows_one_live_line_with_count_rate_and_time_left(total: int | None, shown: str) -> None:
    out, done = io.StringIO(), [0]
    display = Terminal(Console(file=out, force_terminal=True, width=120))
    with display:
        display.started((Stage("demonstrations", {}),))
        display.follow(total, "rows", lambda: done[0])
        display.since -= 1
        done[0] = 5
        time.sleep(1.2)
        display.finished(Stage("demonstrations", {}), 2.0, skipped=False)
    text = out.getvalue()
    assert "demonstrations" in text and shown in text and "rows, " in text and "/s" in text and ("s left" in text) == (total is not None)


def test_work_that_is_taken_back_begins_anew_and_slow_steps_are_told_in_seconds() -> None:
    out = io.StringIO()
    display, done = Terminal(Console(file=out)), [11]
    display.started((Stage("sft/training", {}),))
    display.follow(18, "steps", lambda: done[0])
    with display:
        done[0] = 0
        time.sleep(1.2)
        assert display.before == 0, "an attempt without a checkpoint starts at 0"
    display.since = time.monotonic() - 60
    assert display._rate(3) == "steps, 20.0 s each, 300 s left"
    display.since = time.monotonic() - 2
    assert display._rate(10) == "steps, 5.0/s, 2 s left"
    assert display._rate(0) == "steps, starting"
    display.finished(Stage("sft/training", {}), 3.21, skipped=False)
    assert "+ sft/training  3.2 s" in out.getvalue()


def test_many_stages_that_run_together_are_counted_not_named() -> None:
    assert titled(["a", "b", "c"]) == "a + b + c" and titled(list("abcdefg")) == "a + b + c + 4 more"
