"""A judge's answer, from words or probabilities to a verdict. Pure functions of text and numbers."""

import math
import re
from collections.abc import Sequence
from typing import Literal

from actors.judge.prompts import ENDINGS

Reading = Literal[0, 1, "tie", "unparsed"]
"""which response is better; neither; or nobody knows what the judge meant"""

LETTERS: dict[str, Reading] = {"A": 0, "B": 1, "C": "tie"}
_IS = r"\**(?:\s+is\b\s*:?|\s*:)[\s*]*"
_SAID = r"[*\"')]*\s*(?:[.!;\n]|$|,?\s(?:because|since)\b)"
"""Nothing is said on behind it: "The winner is A? No" and "Rating: 1 to 10" name neither a winner nor a grade."""
_NO_LIST = r"(?![*`\"']*\s*,?\s*(?:if\b|for (?:response )?(?:A|B|neither)\b|(?:or\s+)?[*`\"']*\[\[))"
"""Behind a mark: before "if" or another mark it tells how to answer, and is no answer."""
_MARKED = re.compile(rf"(?<!\]\] or )(?<!\]\], or )\[\[\s*([ABC])\s*\]\]{_NO_LIST}")
_NAMED = re.compile(
    rf"(?:verdict|winner|better(?:\s+(?:response|answer|one))?){_IS}(?:response|assistant|answer)?\s*[*\"'(]*((?-i:[AB])){_SAID}",
    re.IGNORECASE,
)
_ALONE = re.compile(r"\W*([ABC])\W*")
_NUMBER = r"(\d++(?:\.\d++)?+)"
_NO_SCALE = "".join(rf"(?<!{word})" for word in ("/", "/ ", "out of ", "scale of ", r"\[\[1\]\] to ", r"\b1 to ", "such as "))
_GRADE = re.compile(rf"{_NO_SCALE}\[\[\s*{_NUMBER}\s*(?:/\s*10)?\s*\]\]{_NO_LIST}")
_NAMED_GRADE = re.compile(rf"(?:rating|grade|score){_IS}{_NUMBER}\**(?:\s*(?:/|out of)\s*10)?{_SAID}", re.IGNORECASE)


def read_pair(text: str, cut: bool = False) -> Reading:
    """Which of the responses A and B a judge's words prefer: by its last [[A]], [[B]] or [[C]] (neither), else by its last sentence
    that calls one of them the better, else by a letter that stands alone.

    Args:
        text: the words.
        cut: they end before the judge had ended: only what is marked counts.
    """
    text = _own(text, cut)
    found = _MARKED.findall(text) or ([] if cut else _NAMED.findall(text))
    if found:
        return LETTERS[found[-1]]
    alone = None if cut else _ALONE.fullmatch(text)
    return LETTERS[alone.group(1)] if alone else "unparsed"


def read_grade(text: str, cut: bool = False) -> float | None:
    """The grade from 1 to 10 in a judge's words: its last [[N]], else the last number that it calls a rating; None if there is none.

    Args:
        text: the words.
        cut: they end before the judge had ended: only what is marked counts.
    """
    text = _own(text, cut)
    found = _GRADE.findall(text) or ([] if cut else _NAMED_GRADE.findall(text))
    grade = float(found[-1]) if found else math.nan
    return grade if 1 <= grade <= 10 else None


_TOLD = [told.split() for ending in ENDINGS.values() for told in re.split(r"(?<=[.?])\s", ending)]
"""Words of the sentences that say how to answer."""
_SPACED = [[re.escape(word.rstrip(".,")) + "[.,]?" for word in told] for told in _TOLD]
_ECHO = re.compile("|".join(r"\s+".join(words) for words in _SPACED), re.IGNORECASE)
_BEGUN = re.compile(
    "(?:"
    + "|".join(r"\s+".join(words[:4]) + r"(?:\s+".join(["", *words[4:]]) + ")?" * len(words[4:]) for words in _SPACED)
    + r")(?:\s+\S+)?\s*\Z",
    re.IGNORECASE,
)
"""The beginning of such a sentence, four words at least and a piece of one, at the end of a text."""
_THOUGHTS = re.compile(r"\s*<think>.*?(?:</think>|\Z)|.*^</think>", re.DOTALL | re.MULTILINE)


def _own(text: str, cut: bool) -> str:
    """A judge's own words, behind its thoughts: small ones say again how they were told to answer, marks and all."""
    if thoughts := _THOUGHTS.match(text):
        text = text[thoughts.end() :]
    text = _ECHO.sub("", text)
    return _BEGUN.sub("", text) if cut else text


def read_probabilities(logps: Sequence[float]) -> tuple[Reading, float]:
    """Which label is likelier, and the probability of the first among the two; "unparsed" where they are no numbers.

    Args:
        logps: of the labels A and B, nats.
    """
    if not math.isfinite(max(logps)) or any(map(math.isnan, logps)):
        return "unparsed", math.nan
    first = 1 / (1 + math.exp(min(700.0, logps[1] - logps[0])))
    return ("tie" if logps[0] == logps[1] else 0 if logps[0] > logps[1] else 1), first


def turned(reading: Reading) -> Reading:
    """A verdict on (b, a) as one on (a, b)."""
    return 1 - reading if isinstance(reading, int) else reading  # type: ignore[return-value]


def winner(verdicts: Sequence[Reading]) -> Reading:
    """The outcome of a question in both orders, each told of the order given: a win needs both to agree, disagreement is a tie, what could
    not be read is never a tie."""
    if "unparsed" in verdicts:
        return "unparsed"
    return verdicts[0] if len(set(verdicts)) == 1 else "tie"
