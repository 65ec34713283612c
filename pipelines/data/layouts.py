"""Layouts of demonstration rows: from a row as people publish it to (messages before the response, response).

Pure functions. A bad row raises `RowError` with a reason for a person.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

Message = dict[str, str]
Turns = tuple[list[Message], str]

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class RowError(ValueError):
    """A row that cannot be used, and why."""


def detect(row: Mapping[str, Any], mapped: Collection[str] = ()) -> str | None:
    """The layout of a row by its columns; None if no layout fits.

    Args:
        row: columns by name.
        mapped: those that somebody named on purpose: of several layouts that fit, the one that needs most of them.
    """
    names = {name for name, value in row.items() if value is not None}
    if "chosen" in names and not names & {"prompt", "conversations"} and isinstance(row["chosen"], str):
        return "hh"
    rules = [
        ("preference", {"chosen"}),
        ("spin", {"real"}),
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("alpaca", {"instruction", "output"}),
        ("question_answer", {"question", "answer"}),
        ("prompt_completion", {"prompt", "completion"}),
        ("prompt_response", {"prompt", "response"}),
        ("dolly", {"instruction", "response"}),
        ("input_output", {"input", "output"}),
    ]
    fitting = [(layout, needed) for layout, needed in rules if needed <= names]
    return max(fitting, key=lambda rule: len(rule[1].intersection(mapped)))[0] if fitting else None


def is_of_columns(reason: str) -> bool:
    """Whether a row is rejected because its columns were read wrongly: another layout, or their names, would mend it."""
    return reason.startswith("no layout fits") or ".columns names" in reason or "the layout" in reason or reason.endswith("is missing")


def turns(row: Mapping[str, Any], layout: str) -> Turns:
    """Reads one row.

    Args:
        row: columns by name.
        layout: a key of LAYOUTS.

    Returns:
        all messages before the last assistant turn, behind the column `system` where the row has one and no system turn; and that turn's
        text without white space around it.

    Raises:
        RowError: missing or empty fields, wrong types, unknown roles, no assistant turn.
    """
    prompt, response = LAYOUTS[layout](row)
    system = _text(row, "system") if row.get("system") is not None else ""
    if system.strip() and (not prompt or prompt[0]["role"] != "system"):
        prompt = [{"role": "system", "content": system}, *prompt]
    for message in prompt:
        _unicode(message["content"], "prompt")
    _unicode(response, "response")
    if not any(message["role"] == "user" and message["content"].strip() for message in prompt):
        raise RowError("the prompt is empty")
    if prompt[-1]["role"] != "user":
        raise RowError(f"the response follows a turn of the {prompt[-1]['role']}, not of the user")
    if not response.strip():
        raise RowError("the response is empty")
    return prompt, response.strip()


def rejected(row: Mapping[str, Any], layout: str) -> str:
    """The other side of a preference pair: the response that was not chosen, to the same prompt.

    Raises:
        RowError: the layout has no such side, it cannot be read, or it answers another prompt.
    """
    if layout not in OTHER_SIDE:
        raise RowError(f"the layout {layout!r} has one response a row: pairs need {', '.join(OTHER_SIDE)}")
    chosen, other = OTHER_SIDE[layout]
    if row.get(other) is None:
        raise RowError(f"'{other}' is missing")
    prompt, response = turns(row, layout)
    try:
        other_prompt, other_response = turns({**row, chosen: row[other]}, layout)
    except RowError as error:
        raise RowError(f"the side '{other}' cannot be read: {error}") from None
    if other_prompt != prompt:
        raise RowError(f"'{chosen}' and '{other}' answer different prompts")
    if other_response == response:
        raise RowError(f"'{chosen}' and '{other}' are equal")
    return other_response


OTHER_SIDE = {"preference": ("chosen", "rejected"), "hh": ("chosen", "rejected"), "spin": ("real", "generated")}
"""By layout: the columns of the two sides of a pair."""


def _prompt_completion(row: Mapping[str, Any]) -> Turns:
    return _prompt(row, "prompt"), _response(row, "completion")


def _input_output(row: Mapping[str, Any]) -> Turns:
    return _prompt(row, "input"), _response(row, "output")


def _question_answer(row: Mapping[str, Any]) -> Turns:
    return _prompt(row, "question"), _response(row, "answer")


def _prompt_response(row: Mapping[str, Any]) -> Turns:
    return _prompt(row, "prompt"), _response(row, "response")


def _alpaca(row: Mapping[str, Any]) -> Turns:
    return _instruction(row, "input"), _text(row, "output")


def _dolly(row: Mapping[str, Any]) -> Turns:
    return _instruction(row, "input" if row.get("context") is None else "context"), _text(row, "response")


def _instruction(row: Mapping[str, Any], column: str) -> list[Message]:
    extra = row.get(column) or ""
    if not isinstance(extra, str):
        raise RowError(f"'{column}' is {_kind(extra)}, not text")
    instruction = _text(row, "instruction")
    return [{"role": "user", "content": f"{instruction}\n\n{extra}" if extra.strip() else instruction}]


def _messages(row: Mapping[str, Any], column: str = "messages") -> Turns:
    return _split(_conversation(row, column))


def _sharegpt(row: Mapping[str, Any]) -> Turns:
    return _messages(row, "conversations")


def _spin(row: Mapping[str, Any]) -> Turns:
    return _messages(row, "real")


def _hh(row: Mapping[str, Any]) -> Turns:
    text = _text(row, "chosen")
    parts = HH_TURN.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if len(parts) < 3 or parts[0].strip():
        raise RowError("'chosen' has no 'Human:' and 'Assistant:' turns")
    roles = ["user" if who == "Human" else "assistant" for who in parts[1::2]]
    return _split([{"role": role, "content": said.strip()} for role, said in zip(roles, parts[2::2], strict=True)])


def _preference(row: Mapping[str, Any]) -> Turns:
    chosen = row.get("chosen")
    if isinstance(chosen, Mapping):
        chosen = [chosen]
    if isinstance(chosen, str):
        return _before(row), chosen
    answer = _conversation({"chosen": chosen}, "chosen")
    # The whole conversation may stand in `chosen`; `prompt` repeats its start.
    return _split(answer if len(answer) > 1 else [*_before(row), *answer])


def _before(row: Mapping[str, Any]) -> list[Message]:
    """What both responses of a pair follow: `prompt`, or `conversations` where that alone is filled."""
    alone = row.get("prompt") is None and row.get("conversations") is not None
    return _conversation(row, "conversations") if alone else _prompt(row, "prompt")


LAYOUTS: dict[str, Callable[[Mapping[str, Any]], Turns]] = {
    "prompt_completion": _prompt_completion,
    "prompt_response": _prompt_response,
    "messages": _messages,
    "question_answer": _question_answer,
    "input_output": _input_output,
    "alpaca": _alpaca,
    "dolly": _dolly,
    "sharegpt": _sharegpt,
    "hh": _hh,
    "preference": _preference,
    "spin": _spin,
}


def _prompt(row: Mapping[str, Any], column: str) -> list[Message]:
    if isinstance(row.get(column), str):
        return [{"role": "user", "content": row[column]}]
    return _conversation(row, column, "text or a list of messages")


def _response(row: Mapping[str, Any], column: str) -> str:
    if isinstance(row.get(column), str) or not isinstance(row.get(column), Sequence):
        return _text(row, column)
    return _split([{"role": "user", "content": "-"}, *_conversation(row, column)])[1]


def _conversation(row: Mapping[str, Any], column: str, wanted: str = "a list of messages") -> list[Message]:
    value = row.get(column)
    if value is None:
        raise RowError(f"'{column}' is missing")
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RowError(f"'{column}' is {_kind(value)}, not {wanted}")
    return [_message(item, f"{column}[{i}]") for i, item in enumerate(value)]


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"'{where}' is {_kind(item)}, not a message")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if role not in ROLES:
        raise RowError(f"'{where}' has the role {role!r}; known are {', '.join(ROLES)}")
    if isinstance(content, Sequence) and not isinstance(content, str) and content:
        # OpenAI's parts.
        texts = [part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise RowError(f"the content of '{where}' has parts that are no text")
        content = "".join(str(text) for text in texts)
    if not isinstance(content, str):
        raise RowError(f"the content of '{where}' is {_kind(content)}, not text")
    return {"role": ROLES[role], "content": content}


def _split(conversation: list[Message]) -> Turns:
    last = max((i for i, message in enumerate(conversation) if message["role"] == "assistant"), default=-1)
    if last < 0:
        raise RowError("there is no assistant turn")
    return conversation[:last], conversation[last]["content"]


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise RowError(f"'{column}' is missing")
    if not isinstance(value, str):
        raise RowError(f"'{column}' is {_kind(value)}, not text")
    return value


def _unicode(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"the {what} holds half of a surrogate pair: its encoding is broken") from None


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "missing"}
    return names.get(type(value), type(value).__name__)
