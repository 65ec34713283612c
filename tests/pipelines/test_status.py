"""jobs/status.py: where a run is, out of its files alone."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import ROOT

from jobs import status
from pipelines.report.comparison import jobs
from pipelines.report.facts import gather
from pipelines.run.artifacts import Run, Stage, StageError, read_json, write_json
from pipelines.run.lock import locked
from pipelines.run.manifests import read_manifest, write_manifest
from pipelines.run.plan import Planned, read_plans, write_plan
from pipelines.watching.states import StageFacts
from pipelines.watching.status import ENDED, ProgressFile, _stage, duration, look
from pipelines.watching.watch import Pace, Watch

DATA = Stage("demonstrations", {})


def graph() -> list[Stage]:
    """Two iterations."""
    stages, policy = [DATA], DATA
    for t in (1, 2):
        negatives = Stage(f"iteration-{t}/negatives", {"iteration": t, "sampling": {"seed": t, "samples": 1}}, {"policy": policy})
        policy = Stage(f"iteration-{t}/training", {"training": {"epochs": 1}}, {"start": policy, "data": negatives})
        stages += [negatives, policy]
    return stages


@contextlib.contextmanager
def under_way(root: Path, done: int, at: int = 3) -> Iterator[Watch]:
    """A job of this process that did `done` stages, 10 s each, and is at row `at` of 12 of the next, at 2 rows a second."""
    stages = graph()
    with locked(root):
        write_plan(root, "", "jobs/gsil_iterative.py", stages)
        display = Watch(ProgressFile(root / "progress.json"))
        run = Run(root, display)

        def works(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
            (run.directory(stages[0]) / "rows").write_text("rows")
            return {}

        for stage in stages[:done]:
            run.do(works, stage)
            manifest = read_manifest(run.directory(stage) / "manifest.json") or {}
            write_manifest(run.directory(stage) / "manifest.json", manifest | {"seconds": 10.0})
        if done < len(stages):
            run._open(stages[done])
            display.started((stages[done],))
            display.began -= 4
            display.follow(12, "rows", lambda: at, lambda: {"restarts": 1})
            display.pace = Pace(0, time.monotonic() - 2.0)
            display.pace.at(1, time.monotonic() - 1.0)
            display._look()
            for watcher in display.watchers:
                assert isinstance(watcher, ProgressFile)
                watcher._write(watcher.told)
        yield display


def only(root: Path, now: float | None = None) -> Any:
    (job,) = look(root, now)
    return job


def test_a_run_under_way_tells_its_stages_its_pace_and_what_is_left(tmp_path: Path) -> None:
    with under_way(tmp_path, done=3):
        job = only(tmp_path)
    assert job.state == "running" and job.script == "jobs/gsil_iterative.py" and job.said == f"pid {os.getpid()} on {os.uname().nodename}"
    assert [stage.state for stage in job.stages] == ["done", "done", "done", "running", "to do"]
    assert [stage.seconds for stage in job.stages[:3]] == [10.0] * 3 and job.stages[3].seconds == pytest.approx(4, abs=1)
    assert (job.progress["done"], job.progress["total"], job.progress["unit"]) == (3, 12, "rows")
    assert job.progress["per_second"] == pytest.approx(2, rel=0.1) and job.progress["left"] == pytest.approx(4.5, rel=0.1)
    # The training of iteration 2 costs what that of iteration 1 did.
    assert (job.stages[4].expected, job.stages[4].like) == (10.0, "iteration-1/training")
    assert job.left == pytest.approx(14.5, abs=0.5) and job.unknown == () and job.seconds == pytest.approx(34, abs=1)


def test_what_shared_the_start_of_an_engine_is_no_measure_alone() -> None:
    done = [StageFacts("sft/samples", "done", 20.0), StageFacts("iteration-1/samples", "done", 2.0)]
    expected = _stage(StageFacts("iteration-2/samples", "to do"), done, "running", None)
    assert (expected.expected, expected.like) == (11.0, "iteration-1/samples")


def test_what_cannot_be_known_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with under_way(tmp_path, done=1):
        job = only(tmp_path)
        assert job.unknown == ("iteration-1/training", "iteration-2/negatives", "iteration-2/training")
        assert job.left == pytest.approx(4.5, rel=0.1)
        assert status.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "iteration-1/negatives" in said and "3 of 12 rows, 2.0 a second, 4." in said and "1 restarts" in said, said
    assert "left: at least 4." in said and "not known of iteration-1/training, iteration-2/negatives, iteration-2/training" in said


def test_a_stage_that_has_counted_all_is_finishing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with under_way(tmp_path, done=1, at=12):
        assert status.main([str(tmp_path)]) == 0
    assert "12 of 12 rows, finishing" in capsys.readouterr().out


def test_stages_are_of_a_kind_when_they_do_the_same_work() -> None:
    data, first, training, second, again = (Planned.of(stage) for stage in graph())
    assert first.kind == second.kind and training.kind == again.kind and len({data.kind, first.kind, training.kind}) == 3
    more = Planned.of(Stage("iteration-3/negatives", {"iteration": 3, "sampling": {"seed": 3, "samples": 8}}, {"policy": DATA}))
    assert more.kind != first.kind, "eight samples a prompt are other work"


def test_the_plan_is_written_before_anything_runs_and_read_back(tmp_path: Path) -> None:
    write_plan(tmp_path, "", "jobs/gsil_iterative.py", graph())
    write_plan(tmp_path, "reward-", "jobs/irl_reward.py", graph()[:1])
    main, reward = read_plans(tmp_path)
    assert [stage.name for stage in main.stages] == [stage.name for stage in graph()] and main.pid == os.getpid()
    assert main.stages[2] == Planned.of(graph()[2]) and main.stages[2].inputs == ("demonstrations", "iteration-1/negatives")
    assert (reward.prefix, reward.script, len(reward.stages)) == ("reward-", "jobs/irl_reward.py", 1)
    assert [job.script for job in look(tmp_path)] == ["jobs/gsil_iterative.py", "jobs/irl_reward.py"], "a directory may hold several jobs"


def test_a_job_that_stopped_says_why_and_one_that_was_killed_has_no_words(tmp_path: Path) -> None:
    with under_way(tmp_path, done=3) as display:
        pass
    job = only(tmp_path, time.time() + 240)
    assert job.state == "died" and "stopped without a word 4 min 0" in job.said and job.said.endswith("the same command continues it")
    assert job.stages[3].state == "stopped" and job.progress["done"] == 3
    assert job.left == pytest.approx(20.0) and job.unknown == (), "the whole stage again, at worst"
    display.over("no room on the disk")
    job = only(tmp_path, time.time() + 5)
    assert (
        job.state == "stopped"
        and ": no room on the disk; when that is mended the same command continues it" in job.said
        and job.progress["done"] == 3
    )
    with under_way(tmp_path, done=3):
        assert only(tmp_path).state == "running", "it goes on"


def test_a_run_that_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with under_way(tmp_path, done=5) as display:
        display.over()
        write_json(tmp_path / "summary.json", {"stages": [{"name": "demonstrations", "skipped": True}], "stopped": None})
    job = only(tmp_path)
    assert job.state == ENDED and [stage.state for stage in job.stages] == ["done before", *["done"] * 4] and job.left is None
    (tmp_path / "iteration-2/training/manifest.json").write_text('{"name": "iter')
    assert [stage.state for stage in only(tmp_path).stages][-1] == "damaged"
    assert status.main([str(tmp_path)]) == 0 and "4 of 5 stages" in capsys.readouterr().out
    (tmp_path / "iteration-2/training/manifest.json").unlink()
    write_json(tmp_path / "summary.json", {"stages": [], "stopped": "iteration-1: the held-out metric fell"})
    assert status.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "ended (stopped early: iteration-1: the held-out metric fell)" in said and "not needed" in said and "left" not in said
    write_json(tmp_path / "summary.json", {"stages": [], "stopped": None, "final": "sft"})
    (row,) = jobs([gather(tmp_path)])[1:]
    assert row[:4] == [tmp_path.name, "jobs/gsil_iterative.py", "ended", "4 of 5"] and row[5] == "final policy: sft", "side by side, too"


def test_a_run_on_another_machine_is_told_by_its_files(tmp_path: Path) -> None:
    with under_way(tmp_path, done=3):
        pass
    (tmp_path / ".lock").write_text(f"pid {os.getpid()} on elsewhere since 2026-01-01T00:00:00+00:00")
    write_json(tmp_path / "plan.json", (read_json(tmp_path / "plan.json") or {}) | {"host": "elsewhere"})
    job = only(tmp_path, time.time() + 20)
    assert job.state == "running" and job.said.startswith(f"pid {os.getpid()} on elsewhere, which wrote 20 s ago")
    assert only(tmp_path, time.time() + 120).state == "died"


def test_a_process_that_holds_the_run_and_writes_nothing_is_told(tmp_path: Path) -> None:
    with under_way(tmp_path, done=3):
        job = only(tmp_path, time.time() + 600)
    assert job.state == "running" and job.said.endswith("it wrote nothing for 10 min 00 s")


def test_runs_from_before_there_were_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with under_way(tmp_path, done=3):
        (tmp_path / "plan.json").unlink()
        job = only(tmp_path)
    assert job.state == "running" and [stage.name for stage in job.stages] == [stage.name for stage in graph()[:3]]
    assert status.main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere is no run directory" in capsys.readouterr().err


def test_who_looks_keeps_nobody_out(tmp_path: Path) -> None:
    import fcntl

    with locked(tmp_path), pytest.raises(StageError, match="in use by another process"), locked(tmp_path):
        pass
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        looking = subprocess.Popen([sys.executable, "-c", TAKES_IT, str(tmp_path)], cwd=ROOT)
        time.sleep(0.3)
        fcntl.flock(file, fcntl.LOCK_UN)
        assert looking.wait(timeout=20) == 0


TAKES_IT = """
import pathlib, sys
from pipelines.run.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    pass
"""


def test_it_starts_at_once_and_imports_nothing_heavy(tmp_path: Path) -> None:
    with under_way(tmp_path, done=3):
        script = f"""
import sys, time; sys.argv = ["status", {str(tmp_path)!r}]
from jobs import status
status.main(sys.argv[1:])
print({{"ray", "torch", "pyarrow", "pydantic", "yaml", "transformers", "numpy"}} & set(sys.modules))
print(time.process_time())
"""
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, timeout=60)
    *_, heavy, seconds = done.stdout.splitlines() or ["", ""]
    assert done.returncode == 0 and heavy == "set()", done.stdout + done.stderr
    assert float(seconds) < 1, "of a core"


def test_programs_can_read_it_and_watch_it(tmp_path: Path) -> None:
    with under_way(tmp_path, done=3):
        argv = [sys.executable, "jobs/status.py", str(tmp_path), "--json", "--watch", "0.1"]
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        first, second = (json.loads(process.stdout.readline()) for _ in range(2))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    assert first["state"] == second["state"] == "running" and first["stages"][3]["name"] == "iteration-2/negatives"


@pytest.mark.slow
def test_a_job_that_is_killed(tmp_path: Path) -> None:
    """The real runner and a real Ray instance, with stages of a stub."""
    argv = [sys.executable, "tests/support/stub_job.py", "--run.root", str(tmp_path), "--run.name", "stub", "--ray.num_cpus", "2"]
    root = tmp_path / "stub"
    process = subprocess.Popen(argv, cwd=ROOT, env=os.environ | {"GSIL_STUB_SECONDS": "1"}, stdout=subprocess.DEVNULL)
    while process.poll() is None and not ((root / "plan.json").exists() and only(root).progress.get("done")):
        time.sleep(0.2)
    assert process.poll() is None, "the job ended before it could be stopped"
    process.kill()
    process.wait(timeout=60)
    job = only(root)
    assert job.state == "died" and f"pid {process.pid} on" in job.said and job.progress["unit"] == "rows"
    assert [stage.state for stage in job.stages] == ["done", "stopped", "to do", "to do", "to do"]


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.31, 42.4, 61, 3700)] == ["0.3 s", "42 s", "1 min 01 s", "1 h 01 min"]
