"""Benchmarks: models of known quality get the scores they deserve, on the rows and prompts of the stock tasks."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks_rows import AI2, WINOGRANDE, problems, write_gsm8k, write_lines

from actors.lmeval.engine import Question, answer, build
from actors.lmeval.sandbox import Limits
from actors.settings import Engine
from pipelines.lmeval import catalogue, local_data
from pipelines.run.artifacts import Stage

LM: Any = pytest.importorskip("lm_eval.api.model", reason="the extra eval is not installed").LM
ENGINE = Engine(kv_cache_gib=0.25, dtype="float32")
POLICY = Stage("policy", {})


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    return write_gsm8k(tmp_path)


class Dummy(LM):
    """A model of known quality.

    Args:
        says: the answer to a prompt.
        likes: whether a continuation of a prompt is the right one.
    """

    def __init__(self, says: Callable[[str], str] | None = None, likes: Callable[[str, str], bool] | None = None):
        super().__init__()
        self.says, self.likes = says, likes
        self.prompts: list[str] = []

    def generate_until(self, requests: list[Any]) -> list[str]:
        assert self.says
        self.prompts += [request.args[0] for request in requests]
        return [self.says(request.args[0]) for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        assert self.likes
        self.prompts += [request.args[0] for request in requests]
        return [(-1.0, True) if self.likes(*request.args) else (-9.0, False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return "".join(f"[{turn['role']}]{turn['content']}" for turn in chat_history) + "[assistant]" * add_generation_prompt

    @property
    def tokenizer_name(self) -> str:
        return "none"


def asked(lm: Dummy, task: str, data: Path, shots: int = 1, limit: int | None = None, chat: bool = False) -> dict[str, Any]:
    """A task on local files, without stages."""
    (leaf,) = catalogue.find(task).leaves
    local = local_data.locate(leaf, {leaf.name: str(data)}, shots)
    assert local
    code = Limits(seconds=5) if leaf.runs_code else None
    question = Question(leaf.name, leaf.file, leaf.changes, shots, limit, 1234, chat, local.evaluated, local.shots_from, code)
    return answer(lm, build(question, local_data.read(leaf.name, local)), question)


def last_question(prompt: str) -> str:
    return prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:")


def value(found: dict[str, Any], metric: str) -> float:
    return found["metrics"][metric]["value"]


def check_gold_and_shuffled(directory: Path, limit: int | None = None) -> None:
    """Every answer right: 1; every answer another row's with another number: 0."""
    rows = [json.loads(line) for line in (directory / "test.jsonl").read_text().splitlines()][:limit]
    number = {row["question"]: float(row["answer"].rpartition("#### ")[2].replace(",", "")) for row in rows}
    gold = {row["question"]: row["answer"] for row in rows}
    ordered = sorted(gold, key=lambda question: number[question])
    most = max(sum(n == other for other in number.values()) for n in number.values())
    other = {question: gold[ordered[(place + most) % len(ordered)]] for place, question in enumerate(ordered)}
    assert all(other[question].rpartition("#### ")[2] != gold[question].rpartition("#### ")[2] for question in gold)
    right = asked(Dummy(lambda prompt: " " + gold[last_question(prompt)]), "gsm8k", directory, shots=5, limit=limit)
    assert right["n"] == len(rows) and value(right, "exact_match,strict-match") == value(right, "exact_match,flexible-extract") == 1.0
    wrong = asked(Dummy(lambda prompt: " " + other[last_question(prompt)]), "gsm8k", directory, shots=5, limit=limit)
    assert value(wrong, "exact_match,strict-match") == value(wrong, "exact_match,flexible-extract") == 0.0


def test_gold_answers_score_one_and_shuffled_ones_zero(gsm8k: Path) -> None:
    check_gold_and_shuffled(gsm8k)


@pytest.mark.parametrize("rows", [200, pytest.param(None, marks=pytest.mark.slow)])
def test_gold_answers_on_gsm8k(rows: int | None, shared_data: Path) -> None:
    check_gold_and_shuffled(shared_data / "gsm8k", rows)


def test_rows_say_what_was_asked_and_answered(gsm8k: Path) -> None:
    gold = {row["question"]: row["answer"] for row in problems(12)}
    lm = Dummy(lambda prompt: gold[last_question(prompt)] if "What is 3 and" in last_question(prompt) else "\n#### 7,000.")
    found = asked(lm, "gsm8k", gsm8k, shots=5, limit=4)
    assert [json.loads(row["scores"]) for row in found["rows"]] == [
        {"exact_match,strict-match": score, "exact_match,flexible-extract": score} for score in (0.0, 0.0, 0.0, 1.0)
    ]
    # 1 of 4 right: standard error sqrt(1/4 * 3/4 / 3).
    assert found["metrics"]["exact_match,strict-match"] == {"value": 0.25, "stderr": pytest.approx(0.25)}
    last = found["rows"][3]
    assert last["row"] == 3 and last["target"] == gold["What is 3 and 4?"] and last["responses"] == [gold["What is 3 and 4?"]]
    assert json.loads(last["answers"]) == {"strict-match": ["7"], "flexible-extract": ["7"]}
    (prompt,) = last["prompts"]
    assert prompt.count("Question: ") == 6 and prompt.endswith("Question: What is 3 and 4?\nAnswer:")
    assert all(int(number) >= 500 for number in re.findall(r"What is (\d+)", prompt)[:5]), "examples are of the training split"


def test_a_conversation_has_the_examples_as_turns(gsm8k: Path) -> None:
    lm = Dummy(lambda prompt: "#### 1")
    found = asked(lm, "gsm8k", gsm8k, shots=1, limit=1, chat=True)
    number = int(re.findall(r"What is (\d+)", lm.prompts[0])[0])
    example, question = problems(600)[number], problems(1)[0]
    asked_before = f"[user]Question: {example['question']}\nAnswer:[assistant]{example['answer']}"
    turns = f"{asked_before}[user]Question: {question['question']}\nAnswer:[assistant]"
    assert lm.prompts == found["rows"][0]["prompts"] == [turns] and value(found, "exact_match,strict-match") == 1.0


def test_examples_are_other_rows_where_there_is_no_split_of_them(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "winogrande" / "dev.jsonl", WINOGRANDE).parent
    rights = {row["sentence"].replace("_", row[f"option{row['answer']}"]) for row in WINOGRANDE}
    lm = Dummy(likes=lambda prompt, continuation: (prompt.split("\n\n")[-1] + continuation) in rights)
    found = asked(lm, "winogrande", data, shots=7)
    assert found["n"] == 8 and value(found, "acc") == 1.0
    for prompt in lm.prompts:
        examples = prompt.split("\n\n")[:-1]
        assert set(examples) < rights and len(set(examples)) == 7
    # Seven of eight rows are examples: the eighth is the row itself.
    own = {row["sentence"].replace("_", row[f"option{row['answer']}"]) for row in WINOGRANDE} - set(lm.prompts[0].split("\n\n")[:-1])
    assert own == {"Ann gave Bob 0 pears because Ann was kind."}
    assert found["rows"][1]["target"].endswith("because Bob")
    assert [len(found["rows"][0][key]) for key in ("prompts", "continuations", "loglikelihoods", "responses")] == [2, 2, 2, 0]


HUB = {"id": "M1", "question": "What is wet?", "choices": {"text": ["fire", "water"], "label": ["A", "B"]}, "answerKey": "B"}


def test_arc_in_ai2s_layout_is_asked_as_on_the_hub(tmp_path: Path) -> None:
    assert local_data.arc(AI2) == HUB == local_data.arc(HUB)
    other = {**AI2, "question": {**AI2["question"], "stem": "And dry?"}, "answerKey": "A"}  # type: ignore[dict-item]
    write_lines(tmp_path / "arc" / "ARC-Challenge-Dev.jsonl", [other])
    data = write_lines(tmp_path / "arc" / "ARC-Challenge-Test.jsonl", [AI2, AI2]).parent
    lm = Dummy(likes=lambda prompt, continuation: continuation == " water")
    found = asked(lm, "arc_challenge", data)
    assert lm.prompts[0] == "Question: And dry?\nAnswer: fire\n\nQuestion: What is wet?\nAnswer:"
    assert value(found, "acc_norm") == 1.0
    assert found["rows"][0] | {"scores": ""} == {
        "row": 0,
        "prompts": lm.prompts[:1],
        "continuations": [" fire", " water"],
        "responses": [],
        "loglikelihoods": [-9.0, -1.0],
        "target": "water",
        "answers": "{}",
        "scores": "",
        "verdicts": [],
    }


def test_real_files_of_every_layout(shared_data: Path) -> None:
    for task, folder, shots, rows in (
        ("arc_challenge", "arc", 25, 40),
        ("winogrande", "winogrande", 5, 40),
        ("truthfulqa_mc2", "truthfulqa", 0, 40),
    ):
        nobody = Dummy(likes=lambda prompt, continuation: False)
        found = asked(nobody, task, shared_data / folder, shots=shots, limit=rows)
        assert found["n"] == rows and all(row["continuations"] and row["target"] for row in found["rows"])
    rights = {row["target"] for row in found["rows"]}
    right = asked(
        Dummy(likes=lambda prompt, continuation: continuation.strip() in rights), "truthfulqa_mc2", shared_data / "truthfulqa", 0, 40
    )
    assert value(right, "acc") > value(found, "acc")


PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": "def add(a, b):\n",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}


def test_programs_are_run(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "humaneval" / "HumanEval.jsonl", [PROBLEM, PROBLEM | {"prompt": "def add(a, b, c=0):\n"}]).parent
    lm = Dummy(lambda prompt: "    return a + b\n" if "c=0" in prompt else "    return a * b\n")
    found = asked(lm, "humaneval", data, shots=0)
    assert value(found, "pass@1,create_test") == 0.5
    assert [row["verdicts"] for row in found["rows"]] == [["AssertionError"], ["passed"]]


@pytest.mark.parametrize("rows", [8, pytest.param(None, marks=pytest.mark.slow)])
def test_canonical_solutions_pass(rows: int | None, shared_data: Path) -> None:
    problems = map(json.loads, (shared_data / "humaneval" / "HumanEval.jsonl").read_text().splitlines())
    solutions = {row["prompt"]: row["canonical_solution"] for row in problems}
    found = asked(Dummy(lambda prompt: solutions[prompt]), "humaneval", shared_data / "humaneval", shots=0, limit=rows)
    assert found["n"] == (rows or 164) and value(found, "pass@1,create_test") == 1.0


CHOICE = {
    "question": "What is wet?",
    "options": ["fire", "water"],
    "answer": "B",
    "answer_index": 1,
    "cot_content": "",
    "category": "biology",
}
EQUATION = {"problem": "What is 1 + 1?", "solution": r"It is $\boxed{2}$.", "level": "Level 5", "type": "Algebra"}
MYSTERY = {"narrative": "A and B met.", "question": "Who?", "choices": "['A', 'B']", "answer_index": "1", "answer_choice": "B"}
GOLD: list[tuple[str, dict[str, Any], str, str]] = [
    ("mmlu_abstract_algebra", {"question": "What is wet?", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": ""}, " B", "acc"),
    ("leaderboard_mmlu_pro", CHOICE, " B", "acc"),
    ("mmlu_pro_biology", CHOICE, "The answer is (B).", "exact_match,custom-extract"),
    ("leaderboard_bbh_navigate", {"input": "Turn left.", "target": "No"}, " No", "acc_norm"),
    ("bbh_cot_fewshot_navigate", {"input": "Turn left.", "target": "No"}, " So the answer is No.", "exact_match,get-answer"),
    ("leaderboard_musr_murder_mysteries", MYSTERY, " B", "acc_norm"),
    (
        "leaderboard_math_algebra_hard",
        EQUATION,
        "So it is $2$.\nFinal Answer: The final answer is $2$. I hope it is correct.",
        "exact_match",
    ),
    (
        "mbpp",
        {"task_id": 11, "text": "Double it.", "code": "", "test_list": [f"assert f({n}) == {2 * n}" for n in range(3)]},
        "def f(x):\n    return 2 * x",
        "pass_at_1",
    ),
    (
        "hellaswag",
        {"activity_label": "Rain", "ctx_a": "It rains.", "ctx_b": "", "endings": ["It is dry.", "It is wet."], "label": "1"},
        " It is wet.",
        "acc_norm",
    ),
    ("truthfulqa_mc1", {"question": "Is it?", "mc1_targets": {"choices": ["Yes", "No"], "labels": [1, 0]}}, " Yes", "acc"),
]


@pytest.mark.parametrize(("task", "row", "gold", "metric"), GOLD, ids=[task for task, *_ in GOLD])
def test_every_task_of_the_papers_runs_on_local_rows(task: str, row: dict[str, Any], gold: str, metric: str, tmp_path: Path) -> None:
    (leaf,) = catalogue.find(task).leaves
    shots = min(1, catalogue.find(task).shots(leaf, {}))
    evaluated = leaf.config.get("test_split") or leaf.config["validation_split"]
    write_lines(tmp_path / f"{evaluated}.jsonl", [row, row])
    for split in filter(None, {leaf.config.get(key) for key in ("fewshot_split", "training_split")}):
        write_lines(tmp_path / f"{split}.jsonl", [row])
    right = asked(Dummy(lambda prompt: gold, lambda prompt, continuation: continuation == gold), task, tmp_path, shots)
    wrong = asked(Dummy(lambda prompt: " 3 (", lambda prompt, continuation: continuation != gold), task, tmp_path, shots)
    assert (value(right, metric), value(wrong, metric)) == (1.0, 0.0)
    assert catalogue.main_metric(task, right["metrics"]) == metric
    verdicts = [found["rows"][0]["verdicts"] for found in (right, wrong)]
    assert verdicts == ([["passed"], ["IndentationError: unexpected indent (<candidate>, line 1)"]] if leaf.runs_code else [[], []])
