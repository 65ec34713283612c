"""Layouts of rows: good ones by hand, bad ones with their reason."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.layouts import OTHER_SIDE, RowError, detect, rejected, turns

USER = {"role": "user", "content": "Hi?"}
ANSWER = {"role": "assistant", "content": "Yes."}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("prompt_completion", {"prompt": "Hi?", "completion": "Yes."}),
    ("prompt_completion", {"prompt": [USER], "completion": [ANSWER]}),
    ("prompt_response", {"prompt": "Hi?", "response": "Yes."}),
    ("dolly", {"instruction": "Hi?", "context": "", "response": "Yes.", "category": "open_qa"}),
    ("dolly", {"instruction": "Hi?", "input": " ", "response": "Yes.", "system": " "}),
    ("messages", {"messages": [USER, ANSWER]}),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i?"}]}, ANSWER]}),
    ("question_answer", {"question": "Hi?", "answer": "Yes."}),
    ("alpaca", {"instruction": "Hi?", "input": "", "output": "Yes."}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]}),
    ("hh", {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."}),
    ("preference", {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}),
    ("preference", {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}),
    ("preference", {"prompt": "Hi?", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}),
    ("preference", {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}),
    (
        "preference",
        {
            "conversations": [{"from": "human", "value": "Hi?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
    ),
    ("preference", {"conversations": [{"from": "human", "value": "Hi?"}], "chosen": "Yes.", "rejected": "No."}),
    ("preference", {"prompt": "Hi?", "conversations": [ANSWER], "chosen": "Yes.", "rejected": "No."}),
    ("preference", {"prompt": "Hi?", "conversations": [ANSWER], "chosen": [ANSWER], "rejected": [ANSWER]}),
    ("preference", {"prompt": [USER], "conversations": None, "chosen": "Yes.", "rejected": "No."}),
    ("spin", {"real": [USER, ANSWER], "generated": [USER, ANSWER]}),
    ("input_output", {"input": "Hi?", "output": "Yes.", "reward": 0.5}),
    ("input_output", {"input": [USER], "output": "Yes."}),
]


@pytest.mark.parametrize(("layout", "row"), GOOD)
def test_layouts_are_recognised_and_read(layout: str, row: dict[str, Any]) -> None:
    assert detect(row) == layout
    assert turns(row, layout) == ([USER], "Yes.")


@pytest.mark.parametrize(("layout", "row"), GOOD)
def test_a_column_for_the_system_turn_is_read_in_every_layout(layout: str, row: dict[str, Any]) -> None:
    system = {"role": "system", "content": "Be brief."}
    assert turns(row | {"system": "Be brief."}, layout) == ([system, USER], "Yes.")
    if layout in OTHER_SIDE and row.get(OTHER_SIDE[layout][1]) == "No.":
        assert rejected(row | {"system": "Be brief."}, layout) == "No."


def test_a_conversation_keeps_its_own_system_turn() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert turns({"messages": [system, USER, ANSWER], "system": "Be long."}, "messages") == ([system, USER], "Yes.")
    with pytest.raises(RowError, match="'system' is a number, not text"):
        turns({"messages": [USER, ANSWER], "system": 3}, "messages")


def test_multi_turn_keeps_all_before_the_last_assistant_turn() -> None:
    later = {"role": "user", "content": "Sure?"}
    row = {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER, later, {"role": "assistant", "content": " Quite. "}]}
    assert turns(row, "messages") == ([{"role": "system", "content": "Be brief."}, USER, ANSWER, later], "Quite.")
    hh = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Sure?\n\nAssistant: Quite."}
    assert turns(hh, "hh") == ([USER, ANSWER, later], "Quite.")


def test_alpaca_input_follows_the_instruction() -> None:
    assert turns({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca")[0] == [{"role": "user", "content": "Add.\n\n1 2"}]


@pytest.mark.parametrize(
    ("layout", "row", "reason"),
    [
        ("prompt_completion", {"prompt": "Hi?"}, "'completion' is missing"),
        ("prompt_completion", {"prompt": "", "completion": "Yes."}, "the prompt is empty"),
        ("prompt_completion", {"prompt": "Hi?", "completion": "  "}, "the response is empty"),
        ("prompt_completion", {"prompt": 7, "completion": "Yes."}, "'prompt' is a number, not text or a list of messages"),
        ("prompt_completion", {"prompt": "Hi?", "completion": 7}, "'completion' is a number, not text"),
        ("messages", {"messages": [USER]}, "no assistant turn"),
        ("messages", {"messages": []}, "no assistant turn"),
        ("messages", {"messages": "Hi?"}, "'messages' is text, not a list of messages"),
        ("messages", {"messages": [ANSWER]}, "the prompt is empty"),
        ("messages", {"messages": ["Hi?"]}, "'messages[0]' is text, not a message"),
        ("messages", {"messages": [{"role": "cat", "content": "?"}, ANSWER]}, "the role 'cat'"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, "the content of 'messages[1]' is missing"),
        ("hh", {"chosen": "just text"}, "no 'Human:' and 'Assistant:' turns"),
        ("question_answer", {"question": "Hi?", "answer": "\ud800"}, "surrogate"),
    ],
)
def test_bad_rows_say_why(layout: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as error:
        turns(row, layout)
    assert reason in str(error.value)


def test_unknown_columns_are_no_layout() -> None:
    assert detect({"text": "?"}) is None


def test_columns_that_were_named_are_the_ones_that_are_read() -> None:
    for row in ({"question": "q", "answer": "a"}, {"prompt": "p", "chosen": "c", "rejected": "r"}, {"instruction": "i", "output": "o"}):
        mapped = row | {"prompt": "mine", "completion": "my own"}
        assert detect(mapped, ("prompt", "completion")) == "prompt_completion" != detect(row)
    assert detect({"prompt": "p", "chosen": "c", "rejected": "r", "question": "q", "answer": "a"}, ("prompt", "chosen")) == "preference"


@pytest.mark.parametrize(
    ("file", "layout"),
    [
        ("gsm8k/train.jsonl", "question_answer"),
        ("ultrafeedback/eval_clean.jsonl", "preference"),
        ("hh_harmless/harmless-base-test.jsonl.gz", "hh"),
        ("alpaca/alpaca_en_demo.json", "alpaca"),
        ("alpaca/dpo_en_demo.json", "preference"),
        ("alpaca/kto_en_demo.json", "messages"),
        ("pairs/gsm8k_smollm2.jsonl", "preference"),
    ],
)
def test_real_data_sets_are_recognised(file: str, layout: str, shared_data: Path) -> None:
    path = shared_data / file
    content = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    rows = json.loads(content) if path.suffix == ".json" else [json.loads(line) for line in content.splitlines()]
    assert {detect(row) for row in rows} == {layout}
    read = 0
    for row in rows:
        try:
            prompt, response = turns(row, layout)
        except RowError:
            continue
        read += 1
        assert prompt[-1]["role"] == "user" and response
    assert read > 0.98 * len(rows)
