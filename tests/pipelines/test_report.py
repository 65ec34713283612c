"""The report of a run in progress and of one that has ended; runs side by side."""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from stages import renumber

from jobs import compare
from pipelines import tournament
from pipelines.evaluation import SCORES
from pipelines.records import DEMONSTRATION, SAMPLE, write_rows
from pipelines.report import comparison, facts, figures
from pipelines.report.comparison import differences
from pipelines.report.decks import decks
from pipelines.report.doubts import doubts
from pipelines.report.facts import gather
from pipelines.report.page import notes
from pipelines.report.writing import Reporter
from pipelines.run.artifacts import Run, Stage, write_json

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DATA = Stage("demonstrations", {})
OBJECTIVE = {"name": "gsil_logistic", "beta": 1.0, "gamma": 1.0}


def sampled(name: str, *inputs: Stage) -> Stage:
    return Stage(name, {"sampling": {"temperature": 1}}, {stage.name: stage for stage in inputs})


def graph() -> list[Stage]:
    """A run of one iteration, without the base model."""
    sft = Stage("sft/training", {}, {"data": DATA})
    answers = sampled("sft/samples", sft, DATA)
    negatives = sampled("iteration-1/negatives", sft, DATA)
    trained = Stage("iteration-1/training", {"objective": OBJECTIVE}, {"negatives": negatives})
    better = sampled("iteration-1/samples", trained, DATA)
    return [
        *(DATA, sft, answers, Stage("sft/evaluation", {}, {"samples": answers}), negatives, trained, better),
        Stage("iteration-1/evaluation", {}, {"samples": better}),
    ]


def write_samples(folder: Path, words: str, cut: int = 0) -> None:
    rows = [
        {"id": str(k), "iteration": 0, "sample": 0, "prompt": [], "prompt_ids": [], "response": words, "response_ids": [1] * (5 + k)}
        | {"finish_reason": "length" if k < cut else "stop"}
        for k in range(4)
    ]
    folder.mkdir()
    write_rows(folder / "00000.parquet", rows, SAMPLE)


def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
    """What the real stages leave behind."""
    (stage,) = stages
    folder = run.directory(stage)
    numbers: dict[str, Any] = {}
    if stage is DATA:
        question = [{"role": "user", "content": "How many?"}]
        row = {"source": "x", "prompt": question, "response": "Five <b>sheep</b>", "prompt_ids": [1], "response_ids": [2]}
        (folder / "held_out").mkdir()
        write_rows(folder / "held_out" / "00000.parquet", [{"id": str(k), **row} for k in range(4)], DEMONSTRATION)
        numbers = {"train": 8, "held_out": 4, "rejected": 1, "read": 13}
    elif stage.name.endswith("/training"):
        steps: list[dict[str, float]] = [{"step": k, "loss": 2.0 - k / 10, "grad_norm": 1.0, "tokens_per_second": 9.0} for k in range(8)]
        if stage.name.startswith("iteration"):
            steps = [step | {"reward_real": -0.1 * k, "reward_generated": -k, "margin": k} for k, step in enumerate(steps)]
            numbers = {"tail_reward_real": -0.2, "held_out": {"reward_real": -0.2, "accuracy": 0.75, "rows": 40}}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    elif stage.name.endswith("/evaluation"):
        numbers = {"accuracy": 0.5 if stage.name.startswith("sft") else 0.25, "stderr": 0.05, "n": 100, "truncated": 0}
        write_json(folder / "scores.json", {})
    else:
        training = stage.name.endswith("/negatives")
        write_samples(folder / ("train" if training else "held_out"), f"said by {stage.name}", cut=3 if training else 0)
    return {stage.name: numbers}


def test_a_run_in_progress_can_be_looked_at(tmp_path: Path) -> None:
    stages = graph()
    pages = []
    reporter = Reporter(tmp_path, stages)

    def report() -> None:
        reporter()
        pages.append(reporter.page.read_text())

    run = Run(tmp_path, report=report)
    for stage in stages[:4]:
        run.do(work, stage)
    assert len(pages) == 8, "when a stage begins and when it ends"
    states = re.findall(r'<div class="box ([\w-]+)"', pages[2])
    assert states == ["done", "running", *["to-do"] * 6]
    assert "under way: 4 of 8 stages" in pages[-1] and "<td>0.500</td>" in pages[-1] and "said by sft/samples" in pages[-1]
    assert "aria-label=&quot;training&quot;" not in pages[-1] and 'aria-label="sft"' in pages[-1]
    again = Run(tmp_path, report=report)
    reporter.log = again.log
    for stage in stages[:5]:
        again.do(work, stage)
    states = re.findall(r'<div class="box ([\w-]+)"', pages[-1])
    assert states == [*["done-before"] * 4, "done", *["to-do"] * 3], "not only once it has ended"


def test_a_run_that_stopped_says_why(tmp_path: Path) -> None:
    stages = graph()
    reporter = Reporter(tmp_path, stages)

    def broken(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        raise ValueError

    run = Run(tmp_path, report=reporter)
    run.do(work, stages[0])
    with pytest.raises(ValueError):
        run.do(broken, stages[1])
    assert "sft/training | running" in reporter.page.with_suffix(".md").read_text()
    reporter(failure="no room on the disk")
    page, text = (reporter.page.with_suffix(f".{ending}").read_text() for ending in ("html", "md"))
    assert "stopped: 1 of 8 stages" in text and "**Stopped**: no room on the disk" in text and "sft/training | stopped" in text
    assert "no room on the disk" in page and "No warnings" not in page and 'class="box stopped"' in page


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    root = tmp_path / "ended"
    stages = graph()
    run = Run(root)
    for stage in stages:
        run.do(work, stage)
    (root / "config.yaml").write_text("objective:\n  beta: 1.0\nrun:\n  name: ended\n")
    summary = {
        "warnings": ["mind the gap"],
        "final": "sft",
        "stopped": None,
        "stages": [entry | {"skipped": True} for entry in run.log[:1]],
    }
    write_json(root / "summary.json", summary)
    Reporter(root, stages)()
    return root


def test_what_is_wrong_is_said(ended: Path) -> None:
    said = doubts(gather(ended))
    assert said[:2] == ["mind the gap", "demonstrations: 1 of 13 rows were set aside; demonstrations/rejected.parquet says why"]
    assert len(said) == 5
    assert any("stays below zero (-0.200)" in text for text in said)
    assert any(text == "iteration-1 is worse than sft: 0.250 after 0.500" for text in said)
    assert any(text.startswith("iteration-1/negatives: 75% of the responses were cut") for text in said)
    page, text = ((ended / f"report.{ending}").read_text() for ending in ("html", "md"))
    assert all(warning in text and warning.replace("'", "&#x27;") in page for warning in said)


def test_the_page_is_whole_and_shows_everybody(ended: Path) -> None:
    page = (ended / "report.html").read_text()
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.findall(r"<(?:link|img|script)[^>]+(?:src|href)=", page)
    assert "Five &lt;b&gt;sheep&lt;/b&gt;" in page and page.count('class="card"') == 4
    assert "said by sft/samples" in page and "said by iteration-1/samples" in page
    assert all(f'aria-label="{name}"' in page for name in ("training", "sft", "accuracy", "lengths")) and figures.INK not in page
    assert "ended: 8 of 8 stages" in page and "final policy: sft" in page and 'class="box done-before"' in page
    table = (ended / "report.md").read_text()
    assert "| iteration-1 | 0.250 | 0.050 | 100 | -0.200 | 0.750 of 40 |" in table, table
    assert "| demonstrations | done before |" in table and "Training on demonstrations: sft<" in page
    assert "| rows of | train | held out | rejected | read |" in table and "| demonstrations | 8 | 4 | 1 | 13 |" in table
    assert re.search(r"\| ray +\| 2\.\d+\.\d+", table) and "objective:\n  beta: 1.0" in table
    assert all(text in page for text in ("<td>demonstrations</td><td>8</td><td>4</td><td>1</td><td>13</td>", "<td>ray</td>", "  beta: 1.0"))


def test_every_curve_of_a_step_is_drawn(ended: Path) -> None:
    (drawn,) = (svg for title, svg in figures.training(gather(ended)).items() if title.startswith("Training on pairs"))
    titles = ["rewards (beta x log ratio)", "margin", "loss and its parts", "log-probs, nats", "pairs told apart", "gradient norm"]
    assert all(f">{title}<" in drawn for title in titles)
    names = ["reward real", "reward generated", "loss", "loss real", "loss generated", "logps real", "logps generated"]
    assert all(f">{name}<" in drawn for name in names)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")])
def test_in_a_browser_nothing_overflows_and_rows_can_be_browsed(ended: Path, width: int, scheme: Any) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto((ended / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "wide tables and figures scroll by themselves"
        assert page.locator(".card:visible").count() == 1 and page.locator(".place").text_content() == "1 of 4"
        page.click(".after")
        assert page.locator(".place").text_content() == "2 of 4"
        page.click(".before")
        page.click(".before")
        assert page.locator(".place").text_content() == "4 of 4"
        inks = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.querySelector('figure svg')).color]")
        assert inks[0] == inks[1] == ("rgb(230, 232, 235)" if scheme == "dark" else "rgb(28, 30, 33)")
        if folder := os.environ.get("GSIL_PICTURES"):
            page.screenshot(path=str(Path(folder) / f"report-{width}-{scheme}.png"), full_page=True)
        page.emulate_media(media="print")
        assert page.locator(".card:visible").count() == 4 and not page.locator("nav").is_visible(), "on paper all rows are shown"
        assert not problems
        browser.close()


def test_a_report_that_cannot_be_written_costs_no_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(facts, "gather", broken)
    monkeypatch.setattr(logging.getLogger("gsil"), "propagate", True)
    run = Run(tmp_path, report=Reporter(tmp_path, [DATA]))
    run.do(work, DATA)
    assert run.manifest(DATA) and "disk full" in caplog.text


def test_an_objective_without_a_generated_side_is_reported_too(ended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renumber(ended / "iteration-1" / "training", last={"loss": 1.0, "logps_real": -2.0})
    Reporter(ended, graph())()
    told = (ended / "report.md").read_text()
    assert "| iteration-1 | 0.250 | 0.050 | 100 |\n" in told and "damaged" not in told
    assert compare.main([str(ended), "--output", str(ended / "compare.html")]) == 0 and "iteration-1" in capsys.readouterr().out


def test_of_none_right_it_says_how_many_may_be(ended: Path) -> None:
    assert "Wilson" not in (ended / "report.md").read_text()
    renumber(ended / "sft" / "evaluation", accuracy=0.0, stderr=0.0, n=100)
    Reporter(ended, graph())()
    told = [(ended / f"report.{ending}").read_text() for ending in ("html", "md")]
    assert all("(Wilson) the true share behind 0 of 100 is at most 0.037." in text for text in told)


def test_scores_of_another_command_are_not_shown(ended: Path) -> None:
    write_rows(ended / "sft" / "evaluation" / "00000.parquet", [{"id": str(k), "score": 1.0} for k in range(4)], SCORES)
    own = [stage for stage in graph() if stage.name != "sft/evaluation"]
    for stages, mark in ((graph(), "right"), (own, "")):
        cards = decks(gather(ended, stages))["Answers"]
        assert [side.mark for card in cards for side in card.sides if side.name == "sft"] == [mark] * 4


EVALUATION = {
    "evaluation/policies/sft/prompts": ({}, {"train": 12, "held_out": 0, "rejected": 1, "read": 13}),
    "evaluation/judge/model": ({"path": "org/judge"}, {}),
    "evaluation/tournament/questions": ({"mode": "logprob"}, {"games": 36, "equal": 3}),
    "evaluation/tournament/answers": ({"url": None, "url_model": ""}, {}),
    "evaluation/mt_bench/answers": ({"url": "http://host/v1", "url_model": "large"}, {}),
}


@pytest.mark.parametrize("outcome", ["tie", "first"])
def test_an_evaluation_says_who_judged_and_ranks_what_was_decided(tmp_path: Path, outcome: str) -> None:
    said = {"response_first": "a", "response_second": "b"}
    games = [{"id": str(k), "first": "sft", "second": "dil", "outcome": outcome, **said} for k in range(20)]
    found = EVALUATION | {"evaluation/tournament/games": ({}, tournament.numbers(games, ["sft", "dil"], seed=0))}

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        (stage,) = stages
        write_json(run.directory(stage) / "made.json", {})
        return {stage.name: found[stage.name][1]}

    stages = [Stage(name, settings) for name, (settings, _) in found.items()]
    for stage in stages:
        Run(tmp_path / "x").do(work, stage)
    reporter = Reporter(tmp_path / "x", stages, "evaluation-")
    reporter()
    page, text = (reporter.page.with_suffix(f".{ending}").read_text() for ending in ("html", "md"))
    assert "<h1>x: evaluation</h1>" in page and text.startswith("# x: evaluation\n")
    for told in (page, text):
        assert "Who judged: org/judge, mode logprob. 3 of 36 games were between equal responses" in told
        assert ("nobody won a game: there is no ranking" in told) == (outcome == "tie") != ("Ranking (Bradley-Terry" in told)
        assert "the true share behind 0 of 20 is at most 0.161, behind 20 of 20 is at least 0.839." in told
        assert ("the games of every pair all ended alike" in told) == (outcome == "first"), (
            "who wins all is better, nobody knows by how much"
        )
    assert ('aria-label="ranking"' in page) == (outcome != "tie")
    assert "## Prompts\n\n| rows of | prompts | rejected | read |\n" in text and "| evaluation/policies/sft/prompts | 12 | 1 | 13 |" in text
    assert notes(gather(tmp_path / "x"))["MT-Bench, grades from 1 to 10"] == "Who judged: large at http://host/v1."


def test_a_metrics_file_may_end_in_half_a_line(ended: Path) -> None:
    with (ended / "sft" / "training" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert len(gather(ended).curves["sft/training"]) == 8


def test_runs_side_by_side(ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    run = Run(other)
    for stage in graph()[:4]:
        run.do(work, stage)
    (other / "config.yaml").write_text("objective:\n  beta: 2.0\nrun:\n  name: other\n")
    assert differences([gather(ended), gather(other)]) == [["setting", "ended", "other"], ["objective.beta", "1.0", "2.0"]]
    with (other / "config.yaml").open("a") as file:
        file.write("best_of_n:\n  n: 4\n  prompts: 8\n")
    assert differences([gather(ended), gather(other)])[2:] == [], "another job's settings are not listed: that it ran, its row says"
    output = tmp_path / "both.html"
    # The one was evaluated in its own directory, the other's evaluation has one of its own.
    (other / "evaluation-config.yaml").write_text("answers:\n  samples: 8\nobjective:\n  beta: 9.0\n")
    asked = tmp_path / "asked"
    Run(asked).do(work, graph()[0])
    (asked / "evaluation-config.yaml").write_text("answers:\n  samples: 1\n")
    assert compare.main([str(other), str(asked), "--output", str(output)]) == 0
    assert re.search(r"answers\.samples\W+8\W+1\W", capsys.readouterr().out)
    assert compare.main([str(ended), str(other), "--output", str(output)]) == 0
    told = capsys.readouterr().out
    assert all(text in told for text in ("objective.beta", "Versions that differ: none", "Times", "iteration-1/training", "Data"))
    assert comparison.jobs([gather(ended), gather(other)])[1:] == [
        ["ended", "", "ended", "8 of 8", "0.0 s", "there is no plan.json: the stages that are done, without those to do"],
        ["other", "", "stopped", "4 of 4", "0.0 s", "there is no plan.json: the stages that are done, without those to do"],
    ]
    high = tmp_path / "high"
    shutil.copytree(ended, high)
    renumber(high / "sft" / "evaluation", accuracy=0.9, stderr=0.02)
    drawn = [figures.accuracy(run, [gather(ended), gather(high)]) for run in (gather(ended), gather(high))]
    assert all(">0.8<" in svg for svg in drawn) and ">0.8<" not in figures.accuracy(gather(ended)), "the same axis side by side"
    page = output.read_text()
    assert page.count('aria-label="training"') == 1 and "ended and other" in page and "objective.beta" in page
    assert "Versions that differ: none</h2><h2>" in page and "software" not in told, "no table where nothing differs"
    (other / "config.yaml").rename(other / "reward-config.yaml")
    assert compare.main([str(ended), str(other), "--output", str(output)]) == 0
    assert "objective.beta" in output.read_text(), "a run of the reward job alone has its own files"
    assert compare.main([str(tmp_path / "nowhere")]) == 1
    assert "is no run directory" in capsys.readouterr().err
