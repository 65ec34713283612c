"""Who is told how a run goes: the clock behind the display, the pace, and the terminal."""

import io
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.policy_training import newest
from pipelines.run.artifacts import Run, Stage
from pipelines.tables import Shown, Table
from pipelines.watching.terminal import NARROW, Terminal, print_result, rate, short
from pipelines.watching.watch import Pace, Progress, Watch, Watcher, iteration, title

DATA = Stage("demonstrations", {})


@pytest.mark.parametrize(("total", "shown"), [(40, "5/40"), (None, "5/?")])
def test_a_terminal_shows_one_live_line_with_count_rate_and_time_left(total: int | None, shown: str) -> None:
    out, done = io.StringIO(), [0]
    with Terminal(Console(file=out, force_terminal=True, width=120)) as terminal, Watch(terminal) as display:
        display.started((DATA,))
        display.follow(total, "rows", lambda: done[0])
        time.sleep(0.2)
        done[0] = 2
        time.sleep(0.8)
        done[0] = 5
        time.sleep(1.2)
        display.finished(DATA, 2.0, skipped=False, numbers={})
    text = out.getvalue()
    assert "demonstrations" in text and shown in text and "rows, " in text and "/s" in text and ("s left" in text) == (total is not None)
    assert "+ demonstrations  2.0 s" in text


@pytest.mark.parametrize("width", ["100", "60", "20"])
def test_no_word_of_a_table_is_cut(width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", width)
    rows = [["policy", "standard error", "length_controlled"], ["a policy/of-some-name", "0.250 ± 0.125", "[bold] 1.5"], ["base", "", ""]]
    print_result(Shown([Table("Title", rows)], []))
    out = capsys.readouterr().out
    assert rows[1][0] in out and all(word in out for row in rows for cell in row for word in cell.split())


def test_names_of_stages_leave_room_for_what_is_counted() -> None:
    assert short(["sft/training"]) == "sft/training" and short(["a", "b", "c"]) == "a + 2 more"
    tasks = [f"evaluation/policies/model/tasks/{name}" for name in ("arc_challenge", "gsm8k")]
    assert short(tasks) == "...el/tasks/arc_challenge + 1 more" and len(short(tasks)) == NARROW == len(short(tasks[:1]))


def test_rates_in_words() -> None:
    def words(done: int, per_second: float | None, total: int | None = 18) -> str:
        return rate(Progress(("sft/training",), 60.0, "steps", done, total, per_second))

    assert words(3, 1 / 20) == "steps, 20.0 s each, 300 s left"
    assert words(10, 5.0) == "steps, 5.0/s, 2 s left"
    assert words(10, 5.0, None) == "steps, 5.0/s"
    assert words(0, None) == "steps, starting" and words(1, None) == "steps" and words(18, 5.0) == "steps, finishing"


def test_the_pace_counts_from_the_first_unit_on() -> None:
    pace = Pace(2, 100.0)
    assert pace.at(2, 150.0) is None, "what was there before is not of this attempt"
    assert pace.at(4, 160.0) is None and pace.at(4, 165.0) is None, "they came with the engine's start"
    assert pace.at(8, 170.0) == pytest.approx(4 / 10), "the 60 s before the first were the engine's start"
    assert pace.at(8, 171.0) == pytest.approx(4 / 10), "between two units it stays"
    assert pace.at(8, 260.0) == pytest.approx(5 / 100), "and falls when the next is late"


def test_work_that_is_taken_back_begins_anew() -> None:
    pace = Pace(0, 0.0)
    assert pace.at(1, 10.0) is None and pace.at(11, 20.0) == pytest.approx(1.0)
    assert pace.at(0, 30.0) is None, "an attempt without a checkpoint starts at 0"
    assert pace.at(1, 40.0) is None and pace.at(2, 50.0) == pytest.approx(0.1)


def test_titles_and_iterations() -> None:
    assert title(("sft/samples", "iteration-1/negatives")) == "sft/samples + iteration-1/negatives"
    assert title(tuple("abcde")) == "a + b + c + 2 more" and title(()) == ""
    assert iteration(("sft/samples", "iteration-12/negatives")) == 12
    assert iteration(("sft/training", "my-iteration-2x/samples")) is None


class Hears(Watcher):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def began(self, progress: Progress) -> None:
        self.heard.append(("began", progress.stages))

    def goes_on(self, progress: Progress) -> None:
        self.heard.append((progress.done, dict(progress.also)))

    def ended(self, stage: str, seconds: float, skipped: bool, numbers: Any) -> None:
        self.heard.append(("ended", stage, skipped, numbers))


def test_watchers_hear_of_every_stage_and_one_that_fails_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Watcher):
        def goes_on(self, progress: Progress) -> None:
            raise RuntimeError("no network")

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        run.display.follow(3, "rows", lambda: 3, lambda: {"rejected": 1})
        for stage in stages:
            (run.directory(stage) / "rows").write_text("rows")
        return {DATA.name: {"train": 3}}

    hears, other = Hears(), Stage("other", {})
    with caplog.at_level(logging.INFO, "pipelines.watching.watch"):
        display = Watch(Broken(), hears)
        Run(tmp_path, display).do(work, DATA, other)
        Run(tmp_path, display).do(work, DATA)
    first, *rest = hears.heard
    assert first == ("began", ("demonstrations", "other")) and rest[0] == (3, {"rejected": 1}), "a stage of milliseconds is seen whole"
    assert ("ended", "demonstrations", False, {"train": 3}) in rest and rest[-1] == ("ended", "demonstrations", True, {"train": 3})
    assert "Broken is told no more: RuntimeError: no network" in caplog.text and display.watchers == [hears]


def test_the_newest_step_of_a_training(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert newest(path) == {}
    path.write_text('{"step": 1')
    assert newest(path) == {}, "half a line"
    path.write_text('{"step": 1}\n{"step": 2, "tokens_per_second": 5.0}\n{"st')
    assert newest(path) == {"step": 2, "tokens_per_second": 5.0}
    path.write_text("".join(f'{{"step": {step}, "loss": {0.1:.60f}}}\n' for step in range(1, 1001)))
    assert newest(path)["step"] == 1000
