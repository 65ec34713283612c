"""Games, grades and rows of tasks on the page, with the judge's words and what every policy wrote."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.mt_bench import GRADE
from pipelines.records import DEMONSTRATION, SAMPLE, SCORE, write_rows
from pipelines.report import decks, page
from pipelines.report.decks import Card, Side
from pipelines.report.facts import gather
from pipelines.run.artifacts import Run, Stage
from pipelines.tasks import TASK_ROW
from pipelines.tournament import GAME

PROMPTS = Stage("evaluation/policies/a/prompts", {})
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHOICE = {"continuations": [" sheep", " goats"], "responses": [], "loglikelihoods": [-3.5, -1.25], "verdicts": []}
GAMES, GRADES = Stage(decks.GAMES, {}), Stage(decks.GRADES, {})


def written(root: Path, stage: Stage, rows: list[dict[str, Any]], schema: pa.Schema, *names: str) -> None:
    """A stage that is done, with these rows in each of its files."""

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        for name in names:
            path = run.directory(stages[0]) / name
            path.parent.mkdir(exist_ok=True)
            write_rows(path, rows, schema)
        return {}

    Run(root).do(work, stage)


def prompts(root: Path) -> None:
    asked = {"source": "x", "response": "", "prompt_ids": [1], "response_ids": [2]}
    rows = [asked | {"id": str(k), "prompt": [{"role": "user", "content": f"question {k}"}]} for k in range(30)]
    written(root, PROMPTS, rows, DEMONSTRATION, "train/00000.parquet")


def game(number: int, second: str = "b", **said: Any) -> dict[str, Any]:
    asked = {"question": "which?", "answer": "A writes more. [[A]]", "question_swapped": "which?", "answer_swapped": "<b>B</b> [[B]]"}
    found = {"outcome": "first", "given": "first", "swapped": "first"} | asked
    responses = {"response_first": f"a says {number}", "response_second": f"{second} says {number}"}
    return {"id": str(number), "first": "a", "second": second} | responses | found | said


def test_the_first_answer_to_prompts_from_all_over_is_shown_with_its_own_mark_and_whether_it_was_cut(tmp_path: Path) -> None:
    prompts(tmp_path)
    said = {"iteration": 0, "sample": 0, "prompt": [], "prompt_ids": [], "response": "It is", "response_ids": [1]}
    rows = [said | {"id": str(k), "finish_reason": "length" if k % 2 else "stop"} for k in range(30)]
    rows += [row | {"sample": 1, "response": "Another", "finish_reason": "stop"} for row in rows]
    written(tmp_path, Stage("evaluation/policies/a/answers", {}), rows, SAMPLE, "train/00000.parquet")
    scores = [{"id": str(k), "sample": sample, "score": float(k % 2 ^ sample), "reason": None} for sample in range(2) for k in range(30)]
    written(tmp_path, Stage("evaluation/policies/a/score-1", {}), scores, SCORE, "train/00000.parquet")
    cards = decks.decks(gather(tmp_path))["Answers"]
    assert [card.prompt for card in cards] == [f"question {k}" for k in range(0, 30, 3)], "such files are sorted more often than not"
    assert [card.sides[1] for card in cards] == [Side("a", "It is", "wrong"), Side("a", "It is", "right, cut")] * 5
    shown = page.html(gather(tmp_path))
    assert '<span class="score right">right, cut</span>' in shown


def test_of_n_samples_the_chosen_one_is_shown_beside_the_greedy_response(tmp_path: Path) -> None:
    asked = {"source": "x", "prompt_ids": [1], "response_ids": [2]}
    talks = [[{"role": "user", "content": f"question {k}"}] for k in range(12)]
    rows = [asked | {"id": str(k), "prompt": talk, "response": f"answer {k}"} for k, talk in enumerate(talks)]
    written(tmp_path, Stage("demonstrations", {}), rows, DEMONSTRATION, "held_out/00000.parquet")
    said = {"iteration": 1, "prompt_ids": [1], "response_ids": [1], "finish_reason": "stop"}
    greedy = [said | {"id": str(k), "sample": 0, "prompt": talk, "response": f"greedy {k}"} for k, talk in enumerate(talks)]
    written(tmp_path, Stage("best_of_n/greedy", {}), greedy, SAMPLE, "held_out/00000.parquet")
    samples = [said | {"id": str(k), "sample": n, "prompt": talk, "response": f"{k}.{n}"} for k, talk in enumerate(talks) for n in range(4)]
    written(tmp_path, Stage("best_of_n/samples", {}), samples, SAMPLE, "held_out/00000.parquet")
    scores = [{"id": str(k), "sample": 0, "score": float(k == 1), "reason": None} for k in range(12)]
    written(tmp_path, Stage("best_of_n/golden-greedy", {}), scores, SCORE, "held_out/00000.parquet")

    def choose(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        folder = run.directory(stages[0])
        (folder / "samples/held_out").mkdir(parents=True)
        table = pa.Table.from_pylist([row | {"golden": float(row["sample"] == 2)} for row in samples])
        pq.write_table(table, folder / "samples/held_out/00000.parquet")
        lines = [{"input": talk, "output": f"{k}.{2 + k % 2}", "reward": 1.5 + k} for k, talk in enumerate(talks)]
        (folder / "chosen.held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {}

    Run(tmp_path).do(choose, Stage(decks.BEST, {}))
    found = decks.decks(gather(tmp_path))
    assert list(found) == ["The best of N"] and len(found["The best of N"]) == 10
    first, second = found["The best of N"][:2]
    expected = (Side("demonstration", "answer 0"), Side("greedy", "greedy 0", "wrong"), Side("the best of N", "0.2", "right, reward 1.5"))
    assert first == Card("question 0", expected)
    (tmp_path / decks.BEST / "chosen.held_out.jsonl").unlink()
    assert decks.decks(gather(tmp_path)) == {}, "of training prompts alone"
    assert second.sides[1:] == (Side("greedy", "greedy 1", "right"), Side("the best of N", "1.3", "wrong, reward 2.5"))


def test_games_of_every_pair_are_shown_with_what_the_judge_said_in_both_orders(tmp_path: Path) -> None:
    prompts(tmp_path)
    silent: dict[str, Any] = dict.fromkeys(("question", "answer", "question_swapped", "answer_swapped", "given", "swapped"))
    said = {4: {"outcome": "tie", "swapped": "second"}, 8: {"outcome": "tie"} | silent}
    rows = [game(k, **said.get(k, {})) for k in range(20)]
    rows += [
        game(0, "c", outcome="second", given="second", swapped="second"),
        game(1, "c", outcome="failed", given=None, swapped=None, answer_swapped=None),
        game(2, "c", outcome="unparsed", given="unparsed", answer="Well."),
    ]
    written(tmp_path, GAMES, rows, GAME, "games.parquet")
    cards = decks.decks(gather(tmp_path))["Games before the judge"]
    assert [card.prompt for card in cards] == [f"question {k}" for k in (0, 4, 8, 12, 16, 0, 1, 2)]
    assert [card.sides[1].name for card in cards] == ["b"] * 5 + ["c"] * 3
    first, tie, equal = cards[:3]
    assert first == Card(
        "question 0",
        (
            Side("a", "a says 0", "won"),
            Side("b", "b says 0", "lost"),
            Side("the judge, shown a before b", "A writes more. [[A]]", "for a"),
            Side("the judge, shown b before a", "<b>B</b> [[B]]", "for a"),
        ),
    )
    assert [side.mark for side in tie.sides] == ["tie", "tie", "for a", "for b"]
    assert equal.sides[2:] == (Side("the judge", "was not asked: both are the same"),)
    lost, failed, unread = cards[-3:]
    assert [side.mark for side in lost.sides] == ["lost", "won", "for c", "for c"]
    assert [side.mark for side in failed.sides] == ["no answer", "no answer", "", "no answer"]
    assert [side.mark for side in unread.sides] == ["unread", "unread", "unparsed", "for a"]
    shown = page.html(gather(tmp_path))
    assert "&lt;b&gt;B&lt;/b&gt;" in shown and '<span class="score won">won</span>' in shown and '<span class="score">tie</span>' in shown


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")
def test_each_deck_is_browsed_by_its_own_buttons(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    written(tmp_path, GAMES, [game(k) for k in range(20)], GAME, "games.parquet")
    row: dict[str, Any] = {"prompts": ["shots"], "target": "5", "answers": "{}", "scores": "{}", "score": 1.0} | CHOICE
    written(tmp_path, Stage("evaluation/policies/a/tasks/arc", {}), [{"row": k, **row} for k in range(3)], TASK_ROW, "arc.parquet")
    (tmp_path / "report.html").write_text(page.html(gather(tmp_path)))
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page()
        opened.goto((tmp_path / "report.html").as_uri())
        for width in (400, 1280):
            opened.set_viewport_size({"width": width, "height": 900})
            assert opened.evaluate("document.documentElement.scrollWidth") <= width
        opened.locator(".deck").nth(1).locator(".after").click()
        assert opened.locator(".place").all_text_contents() == ["1 of 10", "2 of 3"]
        assert [opened.locator(".deck").nth(k).locator(".card:visible").count() for k in range(2)] == [1, 1]
        browser.close()


def test_grades_of_some_questions_are_shown_for_every_policy_and_turn(tmp_path: Path) -> None:
    rows = [
        {"id": f"q{k}", "policy": policy, "category": "math", "turn": turn, "grade": grade, "question": f"{policy} on {k}", "answer": said}
        for policy, grade, said in (("a", 7.5, "good [[7.5]]"), ("b", None, "who knows"))
        for turn in (1, 2)
        for k in range(8)
    ]
    rows[8] |= {"failed": "no room", "grade": None, "answer": None}
    written(tmp_path, GRADES, rows, GRADE, "grades.parquet")
    cards = decks.decks(gather(tmp_path))["Grades of MT-Bench"]
    assert [(card.prompt, card.sides[0].mark) for card in cards] == [
        *(("a on 0", "7.5"), ("b on 0", "unread"), ("a on 0", "no answer"), ("b on 0", "unread")),
        *(("a on 4", "7.5"), ("b on 4", "unread"), ("a on 4", "7.5"), ("b on 4", "unread")),
    ]
    assert cards[0].sides == (Side("the judge on a, turn 1", "good [[7.5]]", "7.5"),)


@pytest.mark.parametrize(
    ("own", "asked", "text"),
    [
        ({"prompts": ["shots"], "responses": ["5"], "verdicts": ["it timed out"]}, "shots", "5\n\nprogram: it timed out"),
        ({"prompts": ["shots"]} | CHOICE, "shots", "log-prob of each choice, in all:\n   -3.50 sheep\n   -1.25 goats"),
        # Of winogrande it is the prompts that differ.
        ({"prompts": ["Sheep", "Goats"]} | CHOICE, "(1) Sheep\n\n(2) Goats", "in all:\n   -3.50 (1) sheep\n   -1.25 (2) goats"),
    ],
)
def test_rows_of_tasks_are_shown_with_every_policys_answer(own: dict[str, Any], asked: str, text: str, tmp_path: Path) -> None:
    stages = []
    for policy, score in (("a", 1.0), ("b", 0.0)):
        stages.append(Stage(f"evaluation/policies/{policy}/tasks/mmlu", {}))
        row = {"continuations": [], "responses": [], "loglikelihoods": [], "verdicts": []} | own
        row |= {"target": "5", "answers": "{}", "scores": "{}", "score": score}
        rows = [{"row": k, **row} for k in range(40)]
        written(tmp_path, stages[-1], rows, TASK_ROW, "algebra.parquet", "law.parquet", "logic.parquet")
    cards = decks.decks(gather(tmp_path, stages))["Task mmlu"]
    assert [card.prompt.partition("\n")[0] for card in cards] == ["algebra"] * 3 + ["law"] * 3 + ["logic"] * 3, "of each as many"
    assert cards[0].prompt == f"algebra\n\n{asked}" and cards[0].sides[0] == Side("the right answer", "5")
    assert [(side.name, side.mark) for side in cards[0].sides[1:]] == [("a", "right"), ("b", "wrong")]
    assert cards[0].sides[1].text.endswith(text)
