"""Rows of benchmarks in the layouts of their publishers."""

import json
from pathlib import Path
from typing import Any


def problems(count: int) -> list[dict[str, str]]:
    """Rows in GSM8K's layout, all with different answers."""
    return [{"question": f"What is {i} and {i + 1}?", "answer": f"{i} + {i + 1} = {2 * i + 1}\n#### {2 * i + 1:,}"} for i in range(count)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_gsm8k(folder: Path) -> Path:
    """A directory as OpenAI publishes it, small."""
    write_lines(folder / "gsm8k" / "train.jsonl", problems(600)[500:])
    return write_lines(folder / "gsm8k" / "test.jsonl", problems(12)).parent


WINOGRANDE = [
    {"qID": str(i), "sentence": f"Ann gave Bob {i} pears because _ was {kind}.", "option1": "Ann", "option2": "Bob", "answer": right}
    for i in range(4)
    for kind, right in (("kind", "1"), ("hungry", "2"))
]
AI2 = {
    "id": "M1",
    "question": {"stem": "What is wet?", "choices": [{"text": "fire", "label": "A"}, {"text": "water", "label": "B"}]},
    "answerKey": "B",
}
