"""Generated demonstrations of the quickstart: grade-school word problems with worked solutions that end in `#### answer`.

A problem is a template with numbers and names. Which of (template, numbers) are for training and which are held out is decided by
their hash, so the two never share a problem, whatever the counts and seeds.
"""

import hashlib
import operator
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass

VERSION = 1
DRAWS = 500
"""Draws of numbers after which a template counts as used up."""
NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Iris", "Jon", "Kira", "Leo", "Mia", "Noah", "Olga", "Paul")
ITEMS = ("apples", "books", "stamps", "marbles", "cards", "shells", "pencils", "cookies", "stickers", "coins")
OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass(frozen=True)
class Template:
    """A problem with holes.

    Args:
        question: holes {name}, {other}, {item} and one for each number.
        steps: pairs (expression, sentence). An expression is "LEFT OP RIGHT" over numbers and earlier results s1, s2, ...;
            the sentence's hole {is} becomes "3 + 4 = 7".
        numbers: inclusive range of each number.
    """

    question: str
    steps: tuple[tuple[str, str], ...]
    numbers: dict[str, tuple[int, int]]


def _template(question: str, *steps: tuple[str, str], **numbers: tuple[int, int]) -> Template:
    return Template(question, steps, numbers)


MANY, SOME, FEW = (10, 40), (3, 12), (2, 6)

TEMPLATES = (
    _template(
        "{name} has {a} {item}. {name} finds {b} more and gives {c} to {other}. How many {item} does {name} have now?",
        ("a + b", "With the new ones {name} has {is} {item}."), ("s1 - c", "After the gift {is} {item} are left."),
        a=MANY, b=SOME, c=SOME,
    ),
    _template(
        "{name} buys {a} boxes with {b} {item} each and then loses {c} {item}. How many {item} are left?",
        ("a * b", "The boxes hold {is} {item}."), ("s1 - c", "After the loss {is} are left."),
        a=FEW, b=SOME, c=SOME,
    ),
    _template(
        "{name} has {a} {item} and {other} has {b} times as many. How many {item} do they have together?",
        ("a * b", "{other} has {is} {item}."), ("a + s1", "Together they have {is} {item}."),
        a=SOME, b=FEW,
    ),
    _template(
        "A ticket costs {a} dollars. {name} buys {b} tickets and pays with {c} dollars. How many dollars does {name} get back?",
        ("a * b", "The tickets cost {is} dollars."), ("c - s1", "{name} gets {is} dollars back."),
        a=SOME, b=FEW, c=(30, 90),
    ),
    _template(
        "{name} reads {a} pages in the morning and {b} pages in the evening, every day for {c} days. How many pages is that?",
        ("a + b", "A day makes {is} pages."), ("s1 * c", "In all that is {is} pages."),
        a=SOME, b=SOME, c=FEW,
    ),
    _template(
        "{name} shares {a} {item} equally among {b} friends. {other}, one of them, already had {c}. How many does {other} have now?",
        ("a / b", "Each friend gets {is} {item}."), ("s1 + c", "{other} now has {is} {item}."),
        a=(12, 60), b=FEW, c=SOME,
    ),
    _template(
        "A bus has {a} passengers. At a stop {b} get off and {c} get on. At the next stop {d} get on. How many are on the bus?",
        ("a - b", "{is} stay on the bus."), ("s1 + c", "Then there are {is}."), ("s2 + d", "At last there are {is}."),
        a=MANY, b=SOME, c=SOME, d=SOME,
    ),
    _template(
        "{name} earns {a} dollars an hour and works {b} hours. {name} spends {c} dollars on food. How many dollars remain?",
        ("a * b", "The pay is {is} dollars."), ("s1 - c", "After food {is} dollars remain."),
        a=SOME, b=FEW, c=SOME,
    ),
    _template(
        "A farm has {a} cows and {b} times as many hens. {c} hens are sold. How many hens are left?",
        ("a * b", "There are {is} hens."), ("s1 - c", "After the sale {is} hens are left."),
        a=SOME, b=FEW, c=SOME,
    ),
    _template(
        "{name} plants {a} rows of {b} trees. {c} trees die and {name} plants {d} new ones. How many trees stand?",
        ("a * b", "At first {is} trees stand."), ("s1 - c", "{is} of them live."), ("s2 + d", "With the new ones {is} stand."),
        a=FEW, b=SOME, c=FEW, d=SOME,
    ),
    _template(
        "{name} is {a} years old. {other} is {b} years older. How old will {other} be in {c} years?",
        ("a + b", "{other} is {is} years old."), ("s1 + c", "Then {other} will be {is}."),
        a=MANY, b=SOME, c=SOME,
    ),
    _template(
        "{name} bakes {a} trays of {b} rolls. {name} packs them in bags of {c}. How many bags are filled?",
        ("a * b", "There are {is} rolls."), ("s1 / c", "They fill {is} bags."),
        a=FEW, b=SOME, c=FEW,
    ),
    _template(
        "A tank holds {a} liters. {name} takes out {b} liters twice. How many liters are left?",
        ("b + b", "{name} takes out {is} liters."), ("a - s1", "{is} liters are left."),
        a=(30, 80), b=SOME,
    ),
    _template(
        "{name} has {a} red and {b} blue {item}. {name} puts them in {c} equal groups. How many are in a group?",
        ("a + b", "There are {is} {item}."), ("s1 / c", "A group has {is}."),
        a=SOME, b=SOME, c=FEW,
    ),
    _template(
        "{name} runs {a} km on each of {b} days, and {c} km on Sunday. {other} runs {d} km less in all. How far does {other} run?",
        ("a * b", "On those days it is {is} km."), ("s1 + c", "With Sunday it is {is} km."), ("s2 - d", "{other} runs {is} km."),
        a=SOME, b=FEW, c=SOME, d=SOME,
    ),
    _template(
        "A shop sells {a} {item} on Monday and {b} times as many on Tuesday. How many more were sold on Tuesday than on Monday?",
        ("a * b", "On Tuesday {is} were sold."), ("s1 - a", "The difference is {is}."),
        a=SOME, b=FEW,
    ),
    _template(
        "{name} saves {a} dollars a week for {b} weeks. A bike costs {c} dollars. How many dollars are missing?",
        ("a * b", "{name} saves {is} dollars."), ("c - s1", "{is} dollars are missing."),
        a=SOME, b=FEW, c=(40, 95),
    ),
    _template(
        "A class has {a} girls and {b} boys. They form teams of {c}. Then {d} more teams come from another class. How many teams play?",
        ("a + b", "The class has {is} children."), ("s1 / c", "They form {is} teams."), ("s2 + d", "In all {is} teams play."),
        a=SOME, b=SOME, c=FEW, d=FEW,
    ),
    _template(
        "{name} picks {a} pears, {other} picks {b} more than {name}. How many pears do they pick together?",
        ("a + b", "{other} picks {is} pears."), ("a + s1", "Together that is {is} pears."),
        a=MANY, b=SOME,
    ),
    _template(
        "A rope is {a} m long. {name} cuts off {b} pieces of {c} m. How long is the rest?",
        ("b * c", "The pieces are {is} m together."), ("a - s1", "The rest is {is} m long."),
        a=(30, 80), b=FEW, c=FEW,
    ),
    _template(
        "{name} has {a} {item}, {other} has {b} fewer. {other} doubles what {other} has. How many does {other} have then?",
        ("a - b", "{other} has {is} {item}."), ("s1 + s1", "Doubled that is {is}."),
        a=MANY, b=SOME,
    ),
    _template(
        "A pen costs {a} dollars and a bag costs {b} dollars more. {name} buys both. How many dollars does {name} pay?",
        ("a + b", "The bag costs {is} dollars."), ("a + s1", "Both cost {is} dollars."),
        a=SOME, b=SOME,
    ),
    _template(
        "{name} fills {a} shelves with {b} books each. {c} books are lent out and {d} come back. How many books are there?",
        ("a * b", "The shelves hold {is} books."), ("s1 - c", "{is} are left."), ("s2 + d", "In the end there are {is} books."),
        a=FEW, b=SOME, c=SOME, d=FEW,
    ),
    _template(
        "{name} drinks {a} cups of water a day, {other} drinks {b}. How many cups do they drink together in {c} days?",
        ("a + b", "A day makes {is} cups."), ("s1 * c", "In {c} days it is {is} cups."),
        a=FEW, b=FEW, c=SOME,
    ),
    _template(
        "{name} wins {a} points in each of {b} games and loses {c} points for a foul. Then {name}'s points double. How many are they?",
        ("a * b", "The games bring {is} points."), ("s1 - c", "After the foul {is} are left."), ("s2 * 2", "Doubled that is {is}."),
        a=SOME, b=FEW, c=SOME,
    ),
    _template(
        "{name} has {a} dollars. A toy costs {b} dollars and a game {c} dollars. {name} buys both and then gets {d} dollars. "
        "How many dollars does {name} have?",
        ("b + c", "Both cost {is} dollars."), ("a - s1", "{is} dollars are left."), ("s2 + d", "In the end it is {is} dollars."),
        a=(30, 80), b=SOME, c=SOME, d=SOME,
    ),
    _template(
        "{name} sends {a} letters a week. After {b} weeks {name} writes {c} more, and {other} sends {d} times as many in all. "
        "How many does {other} send?",
        ("a * b", "In the weeks it is {is} letters."), ("s1 + c", "{name} sends {is}."), ("s2 * d", "{other} sends {is} letters."),
        a=FEW, b=FEW, c=SOME, d=FEW,
    ),
    _template(
        "{name} buys {a} packs of {b} {item}, gives {c} to {other} and shares the rest equally with {d} persons in all. "
        "How many does each get?",
        ("a * b", "The packs hold {is} {item}."), ("s1 - c", "{is} are left."), ("s2 / d", "Each gets {is}."),
        a=FEW, b=SOME, c=FEW, d=FEW,
    ),
    _template(
        "{name} sells {a} cakes for {b} dollars each and {c} pies for {d} dollars each. {name} pays {e} dollars of rent. "
        "How many dollars are left?",
        ("a * b", "The cakes bring {is} dollars."), ("c * d", "The pies bring {is} dollars."),
        ("s1 + s2", "Together that is {is} dollars."), ("s3 - e", "After the rent {is} dollars are left."),
        a=FEW, b=FEW, c=FEW, d=FEW, e=SOME,
    ),
    _template(
        "{name} has {a} {item} and gets {b} more on each of {c} days. {name} gives {d} to {other} and loses {e}. How many are left?",
        ("b * c", "The days bring {is} {item}."), ("a + s1", "Then {name} has {is}."),
        ("s2 - d", "After the gift {is} are left."), ("s3 - e", "At last {is} are left."),
        a=SOME, b=FEW, c=FEW, d=FEW, e=FEW,
    ),
)  # fmt: skip


def problems(count: int, seed: int, held_out: bool) -> Iterator[dict[str, str]]:
    """Draws distinct problems, templates in turn.

    Args:
        count: how many.
        seed: of numbers and names.
        held_out: from the held-out problems instead of the training ones.

    Yields:
        {"question", "answer"}: the layout of GSM8K.

    Raises:
        ValueError: there are not so many.
    """
    draw = random.Random(f"{seed}:{held_out}")
    seen: set[tuple[int, tuple[int, ...]]] = set()
    left = list(range(len(TEMPLATES)))
    while len(seen) < count:
        if not left:
            raise ValueError(f"{count} generated problems were asked for, there are about {len(seen)}: lower the limit")
        index = left.pop(0)
        for _ in range(DRAWS):
            numbers = {name: draw.randint(*limits) for name, limits in TEMPLATES[index].numbers.items()}
            key = (index, tuple(numbers.values()))
            results = solve(TEMPLATES[index], numbers)
            if key not in seen and results and is_held_out(*key) == held_out:
                seen.add(key)
                left.append(index)
                yield _write(TEMPLATES[index], numbers, results, draw)
                break


def is_held_out(index: int, numbers: tuple[int, ...]) -> bool:
    """A quarter of all (template, numbers), by hash."""
    return hashlib.sha256(repr((index, numbers)).encode()).digest()[0] < 64


def solve(template: Template, numbers: dict[str, int]) -> list[int]:
    """Results of the steps; empty if one is not a positive whole number."""
    values = dict(numbers)
    results: list[int] = []
    for expression, _ in template.steps:
        left, sign, right = (part if part in OPERATORS else _value(part, values) for part in expression.split())
        assert isinstance(left, int) and isinstance(sign, str) and isinstance(right, int)
        result = OPERATORS[sign](left, right)
        if result < 1 or (sign == "/" and left % right):
            return []
        results.append(result)
        values[f"s{len(results)}"] = result
    return results


def _write(template: Template, numbers: dict[str, int], results: list[int], draw: random.Random) -> dict[str, str]:
    name, other = draw.sample(NAMES, 2)
    words = {"name": name, "other": other, "item": draw.choice(ITEMS)} | {key: str(value) for key, value in numbers.items()}
    values = numbers | {f"s{i}": result for i, result in enumerate(results, start=1)}
    lines = []
    for (expression, sentence), result in zip(template.steps, results, strict=True):
        shown = " ".join(part if part in OPERATORS else str(_value(part, values)) for part in expression.split())
        lines.append(string.Formatter().vformat(sentence, (), words | {"is": f"{shown} = {result}"}))
    return {"question": template.question.format(**words), "answer": "\n".join([*lines, f"#### {results[-1]}"])}


def _value(part: str, values: dict[str, int]) -> int:
    return int(part) if part.isdigit() else values[part]
