"""What a judge is asked: templates in files, which a person can replace, and an ending that says how to answer."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
CRITERIA = ("helpful", "harmless", "summary", "mt_bench")
ENDINGS = {
    "text": "Say in one or two sentences why. Then end with [[A]] if response A is better, [[B]] if response B is better, or [[C]] if "
    "neither is.",
    "logprob": "Which response is better? Answer with its letter alone, A or B.",
    "grade": "Say in one or two sentences why. Then end with a whole number from 1 (useless) to 10 (could not be better) in double "
    "brackets, such as [[5]].",
}
_PLACE = re.compile(r"\{(conversation|first|second|response|reference)\}")


def template(criterion: str, graded: bool, folder: Path | None = None) -> str:
    """A template's text: CRITERION.txt, or CRITERION.grade.txt for single responses.

    Args:
        criterion: one of CRITERIA.
        graded: a single response is graded.
        folder: searched first.
    """
    name = f"{criterion}.grade.txt" if graded else f"{criterion}.txt"
    own = folder / name if folder else None
    return (own if own and own.exists() else TEMPLATES / name).read_text(encoding="utf-8")


def places(text: str) -> set[str]:
    """What a template wants filled in."""
    return set(_PLACE.findall(text))


def missing(text: str, responses: int) -> set[str]:
    """What a template for one or two responses lacks: a judge who does not see a response cannot judge it."""
    return ({"response"} if responses == 1 else {"first", "second"}) - places(text)


def repeated(text: str) -> set[str]:
    """What a template wants filled in more than once: a long one would make a question without end."""
    found = _PLACE.findall(text)
    return {name for name in found if found.count(name) > 1} if len(found) <= 4 else places(text)


def fill(text: str, messages: Sequence[Mapping[str, str]], responses: Sequence[str], ending: str, reference: str = "") -> str:
    """The question to the judge.

    Args:
        text: a template.
        messages: the conversation before the response.
        responses: the two to compare, in the order shown; or the one to grade.
        ending: a key of ENDINGS.
        reference: a response that is known to be right; the place for it stays empty where there is none.
    """
    conversation = "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
    names = ("first", "second") if len(responses) == 2 else ("response",)
    known = f"A response that is right, to compare with:\n<reference>\n{reference}\n</reference>" if reference else ""
    values = {"conversation": conversation, "reference": known} | dict(zip(names, responses, strict=True))
    # In one pass: braces inside a response are its own words.
    return f"{_PLACE.sub(lambda place: values.get(place.group(1), place.group(0)), text).rstrip()}\n\n{ENDINGS[ending]}\n"
