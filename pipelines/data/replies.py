"""Generated demonstrations of another kind: replies to customers in a shop's house style, of which a program says how well they keep it.

    Hello, my name is Larsen, order C5617. You sent me another blender than I ordered. Please help.
    -> Dear Larsen,
       we are sorry that you got the wrong blender. We will exchange it within 5 days; your reference is C5617.
       Kind regards, Fernhill Stores

What arithmetic is not: quality stands on the surface of a response, where a small reward model can see it. Which complaints are for
training and which are held out is decided by their hash, so the two never share one, whatever the counts and seeds.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

VERSION = 1
DRAWS = 500
"""Draws in a row that bring nothing new, after which all is used up."""
WORDS = 45
"""that a reply has at most"""
SHOP = "Kind regards, Fernhill Stores"
NAMES = (
    *("Adams", "Becker", "Castillo", "Dubois", "Ekholm", "Fischer", "Garcia", "Hansen", "Ivanova", "Jensen", "Kowalski", "Larsen"),
    *("Moreau", "Novak", "Okafor", "Petrov", "Quinn", "Rossi", "Schmidt", "Tanaka", "Ueda", "Varga", "Weber", "Yilmaz"),
)
THINGS = (
    *("kettle", "desk lamp", "backpack", "toaster", "headset", "tent", "blender", "office chair", "rain jacket"),
    *("bicycle pump", "suitcase", "keyboard", "rug", "coffee grinder", "camera bag", "bookshelf"),
)


@dataclass(frozen=True)
class Complaint:
    """What can be wrong, how customers say it, and what the shop says and does; {thing} is what they bought."""

    said: tuple[str, ...]
    sorry: tuple[str, ...]
    promise: str


COMPLAINTS = (
    Complaint(
        ("The {thing} arrived broken.", "My {thing} stopped working after a day.", "There is a crack in the {thing} that I got."),
        ("we are sorry that your {thing} is broken.", "we are sorry to hear that the {thing} does not work."),
        "We will send a new one within 3 days",
    ),
    Complaint(
        ("The {thing} has not arrived yet.", "I am still waiting for my {thing}.", "Where is the {thing} that I ordered?"),
        ("we are sorry that your {thing} is late.", "we are sorry that you had to wait for the {thing}."),
        "We will look for the parcel within 2 days",
    ),
    Complaint(
        ("You sent me another {thing} than I ordered.", "This is not the {thing} that I chose.", "The {thing} has the wrong colour."),
        ("we are sorry that you got the wrong {thing}.", "we are sorry about the mix-up with your {thing}."),
        "We will exchange it within 5 days",
    ),
)
OPENINGS = ("Hello, my name is {name}, order {order}.", "This is {name} about order {order}.", "{name} here, my order is {order}.")
ENDINGS = ("What will you do?", "Please help.", "I would like to hear from you.", "Can you do something?")


def replies(count: int, seed: int, held_out: bool) -> Iterator[dict[str, str]]:
    """Draws complaints with their replies; no customer complains of one thing in the same way twice.

    Args:
        count: how many.
        seed: of the draws.
        held_out: from the held-out complaints instead of the training ones.

    Yields:
        {"prompt", "completion"}.

    Raises:
        ValueError: there are not so many.
    """
    draw = random.Random(f"replies:{seed}:{held_out}")
    seen: set[tuple[str, str, Complaint]] = set()
    missed = 0
    while len(seen) < count:
        key = name, thing, complaint = draw.choice(NAMES), draw.choice(THINGS), draw.choice(COMPLAINTS)
        if key in seen or is_held_out(*key) != held_out:
            missed += 1
            if missed == DRAWS:
                raise ValueError(f"{count} generated replies were asked for, there are about {len(seen)}: lower the limit")
            continue
        missed = 0
        seen.add(key)
        told = {"name": name, "thing": thing, "order": f"{draw.choice('ABCDEFGHKLM')}{draw.randint(1000, 9999)}"}
        prompt = " ".join(draw.choice(texts) for texts in (OPENINGS, complaint.said, ENDINGS)).format(**told)
        reply = f"Dear {{name}},\n{draw.choice(complaint.sorry)} {complaint.promise}; your reference is {{order}}.\n{SHOP}".format(**told)
        yield {"prompt": prompt, "completion": reply}


def is_held_out(name: str, thing: str, complaint: Complaint) -> bool:
    """A quarter of all (customer, thing, complaint), by hash."""
    return hashlib.sha256(f"{name}:{thing}:{complaint.promise}".encode()).digest()[0] < 64


def style(messages: Sequence[dict[str, str]], response: str) -> float:
    """The share of the house's seven rules that a reply keeps, 0 to 1; every demonstration keeps all.

    It greets the customer by name, says sorry, names the thing, quotes the order, promises what is done about such a complaint, ends with
    the shop's greeting, and is short. A golden judge: `best_of_n.golden: pipelines.data.replies:style`.

    Raises:
        ValueError: the conversation is none of these complaints.
    """
    text = messages[-1]["content"]
    order = re.search(r"\b[A-M]\d{4}\b", text)
    name = next((name for name in NAMES if name in text), None)
    found = [(thing, c) for c in COMPLAINTS for said in c.said for thing in THINGS if said.format(thing=thing) in text]
    if not (order and name and found):
        raise ValueError(f"this is no complaint of the generated replies: {text!r}")
    thing, complaint = found[0]
    kept = (
        response.startswith(f"Dear {name},"),
        "sorry" in response,
        thing in response,
        order[0] in response,
        complaint.promise in response,
        response.rstrip().endswith(SHOP),
        len(response.split()) <= WORDS,
    )
    return sum(kept) / len(kept)
