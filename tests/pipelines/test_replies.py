"""The generated replies: every demonstration keeps the style, what breaks a rule is counted, nothing held out is trained on."""

import re

import pytest

from pipelines.data.replies import COMPLAINTS, NAMES, THINGS, WORDS, is_held_out, replies, style

ASKED = [{"role": "user", "content": "This is Novak about order B1234. The tent has not arrived yet. Please help."}]
GOOD = (
    "Dear Novak,\nwe are sorry that your tent is late. We will look for the parcel within 2 days; your reference is B1234.\n"
    "Kind regards, Fernhill Stores"
)


def test_every_demonstration_keeps_the_style() -> None:
    rows = list(replies(400, seed=3, held_out=False))
    assert len({row["prompt"] for row in rows}) == 400
    assert all(style([{"role": "user", "content": row["prompt"]}], row["completion"]) == 1.0 for row in rows)
    for words in (NAMES, THINGS, [complaint.promise for complaint in COMPLAINTS]):
        assert all(any(word in row["prompt"] + row["completion"] for row in rows) for word in words)


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        (GOOD, 7),
        (GOOD + "\n", 7),
        (GOOD.replace("Dear Novak", "Hello"), 6),
        (GOOD.replace("B1234", "B4321"), 6),
        (GOOD.replace("sorry that your tent", "happy that your kettle"), 5),
        (GOOD.replace("within 2 days", "within 3 days"), 6),
        (GOOD.replace("Kind regards", "Yours"), 6),
        (GOOD.replace("late.", "late." + " very" * WORDS), 6),
        ("", 1),
    ],
)
def test_each_rule_counts_for_a_seventh(reply: str, kept: int) -> None:
    assert style(ASKED, reply) == pytest.approx(kept / 7)


def test_another_conversation_is_an_error() -> None:
    with pytest.raises(ValueError, match="no complaint of the generated replies: 'Where is my tent"):
        style([{"role": "user", "content": "Where is my tent?"}], GOOD)


def test_the_seed_decides_and_what_is_held_out_is_never_trained_on() -> None:
    assert list(replies(50, 5, False)) == list(replies(50, 5, False)) != list(replies(50, 6, False))

    for held_out in (False, True):
        for row in replies(150, 0, held_out):
            text = row["prompt"] + row["completion"]
            name, thing = (next(word for word in words if re.search(rf"\b{word}\b", text)) for words in (NAMES, THINGS))
            complaint = next(complaint for complaint in COMPLAINTS if complaint.promise in text)
            assert is_held_out(name, thing, complaint) == held_out


def test_more_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="generated replies were asked for, there are about"):
        list(replies(10**8, 0, True))
