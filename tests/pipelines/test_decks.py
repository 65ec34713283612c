"""Games, grades and rows of tasks on the page, with the judge's words and what every policy wrote."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
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
GAMES, GRADES = Stage(decks.GAMES, {}), Stage(decks.GRADES, {})


def written(root: Path, stage: Stage, rows: list[dict[str, Any]], schema: pa.Schema, name: str = "00000.parquet") -> None:
    """A stage that is done, with these rows."""

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
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


def test_an_answer_that_was_cut_is_marked(tmp_path: Path) -> None:
    prompts(tmp_path)
    said = {"iteration": 0, "sample": 0, "prompt": [], "prompt_ids": [], "response": "It is", "response_ids": [1]}
    rows = [said | {"id": str(k), "finish_reason": "length" if k else "stop"} for k in range(2)]
    written(tmp_path, Stage("evaluation/policies/a/answers", {}), rows, SAMPLE, "train/00000.parquet")
    scores = [{"id": str(k), "sample": 0, "score": float(k), "reason": None} for k in range(2)]
    written(tmp_path, Stage("evaluation/policies/a/score-1", {}), scores, SCORE, "train/00000.parquet")
    cards = gather(tmp_path).decks["Answers"]
    assert [card.sides[1] for card in cards] == [Side("a", "It is", "wrong"), Side("a", "It is", "right, cut")]
    shown = page.html(gather(tmp_path))
    assert '<span class="score right">right, cut</span>' in shown


def test_games_of_every_pair_are_shown_with_what_the_judge_said_in_both_orders(tmp_path: Path) -> None:
    prompts(tmp_path)
    silent: dict[str, Any] = dict.fromkeys(("question", "answer", "question_swapped", "answer_swapped", "given", "swapped"))
    rows = [game(0), game(1, outcome="tie", swapped="second"), game(2, outcome="tie", **silent), *(game(k) for k in range(3, 20))]
    rows += [
        game(0, "c", outcome="second", given="second", swapped="second"),
        game(1, "c", outcome="failed", swapped=None, answer_swapped=None),
    ]
    written(tmp_path, GAMES, rows, GAME, "games.parquet")
    cards = gather(tmp_path).decks["Games before the judge"]
    assert len(cards) == decks.CARDS and sum(card.sides[1].name == "c" for card in cards) == 2
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
    lost, failed = cards[-2:]
    assert [side.mark for side in lost.sides] == ["lost", "won", "for c", "for c"]
    assert [side.mark for side in failed.sides] == ["failed", "failed", "for a", "no answer"]
    shown = page.html(gather(tmp_path))
    assert "&lt;b&gt;B&lt;/b&gt;" in shown and '<span class="score won">won</span>' in shown and '<span class="score">tie</span>' in shown


def test_grades_are_shown_for_every_policy_beside_what_the_judge_was_shown(tmp_path: Path) -> None:
    rows = [
        {"id": str(k), "policy": policy, "category": "math", "turn": 1, "grade": grade, "question": f"{policy} on {k}", "answer": said}
        for policy, grade, said in (("a", 7.5, "good [[7.5]]"), ("b", None, "who knows"))
        for k in range(8)
    ]
    rows.append(rows[0] | {"turn": 2, "failed": "no room", "grade": None, "answer": None})
    written(tmp_path, GRADES, rows, GRADE, "grades.parquet")
    cards = gather(tmp_path).decks["Grades of MT-Bench"]
    assert [card.prompt for card in cards[:4]] == ["a on 0", "b on 0", "a on 1", "b on 1"] and len(cards) == decks.CARDS
    assert cards[0].sides == (Side("the judge on a, turn 1", "good [[7.5]]", "7.5"),)
    assert cards[1].sides == (Side("the judge on b, turn 1", "who knows", "unread"),)


@pytest.mark.parametrize("choice", [False, True])
def test_rows_of_tasks_are_shown_with_every_policys_answer(choice: bool, tmp_path: Path) -> None:
    stages = []
    for policy, score in (("a", 1.0), ("b", 0.0)):
        said: dict[str, Any] = {"continuations": [], "responses": [f"{policy}: 5"], "loglikelihoods": [], "verdicts": ["it timed out"]}
        if choice:
            said = {"continuations": [" sheep", " goats"], "responses": [], "loglikelihoods": [-3.5, -1.25], "verdicts": []}
        own = {"prompts": ["shots", "question"], "target": "5", "answers": "{}", "scores": json.dumps({}), "score": score}
        stages.append(Stage(f"evaluation/policies/{policy}/tasks/gsm8k", {}))
        written(tmp_path, stages[-1], [{"row": k, **own, **said} for k in range(40)], TASK_ROW)
    cards = gather(tmp_path, stages).decks["Task gsm8k"]
    assert len(cards) == decks.CARDS and cards[0].prompt == "shots\n\nquestion"
    text = "   -1.25 goats\n   -3.50 sheep" if choice else "a: 5\n\nprogram: it timed out"
    assert cards[0].sides[:2] == (Side("the right answer", "5"), Side("a", text, "right")) and cards[0].sides[2].mark == "wrong"
