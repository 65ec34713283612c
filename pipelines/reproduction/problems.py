"""Generated problems with working and a checkable answer, for models of about a million parameters.

    sums          37+48           7+8+0=15;3+4+1=8####85
    letters       rev rot kbdf    fdbk;dbkf####dbkf
    instructions  jump twice after look left    JJ;LKJJ####LKJJ

A careless writer makes the mistakes that people make: forgets the carry, moves the wrong letter, miscounts, turns to the wrong side. They
are systematic, so that a model that has read both writers answers like either, also greedily. Which problems are for training, for
choosing settings and for the test is decided by a hash of the question: the three never share a problem.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

VERSION = 2
MARKER = "####"
"""Before the answer, as in GSM8K."""
LETTERS = "bcdfghklmnpt"
"""No vowels: no word of the tasks can stand in a string of them."""
CARELESS_STEP = 0.6
"""Chance that a careless writer errs in a step."""
TRIES = 10_000
"""Draws in a row without a new problem, after which there are no more."""
MISTAKES = 8
"""Attempts at a wrong solution."""


@dataclass(frozen=True)
class Solution:
    """A question with its working and answer."""

    question: str
    steps: tuple[str, ...]
    answer: str


Wrong = Callable[[], bool]
"""Whether the next step goes wrong."""


def sums(draw: random.Random, length: int, wrong: Wrong) -> Solution:
    """Two numbers of `length` digits, added from the last digit on: a step is digit + digit + carry, which a careless writer
    forgets."""
    left, right = (draw.randint(10 ** (length - 1), 10**length - 1) for _ in range(2))
    carry, digits, steps = 0, "", []
    for a, b in zip(reversed(str(left)), reversed(str(right)), strict=True):
        carry = 0 if wrong() else carry
        total = int(a) + int(b) + carry
        steps.append(f"{a}+{b}+{carry}={total}")
        carry, digits = total // 10, f"{total % 10}{digits}"
    return Solution(f"{left}+{right}", tuple(steps), f"{carry or ''}{digits}")


MOVES: dict[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "rev": (lambda s: s[::-1], lambda s: s[-2::-1] + s[-1]),
    "rot": (lambda s: s[1:] + s[0], lambda s: s[-1] + s[:-1]),
    "swap": (lambda s: s[-1] + s[1:-1] + s[0], lambda s: s[1] + s[0] + s[2:]),
}
"""What an operation makes of a string, and what a careless writer takes it for."""


def letters(draw: random.Random, length: int, wrong: Wrong) -> Solution:
    """`length` - 1 operations on a string of four letters, one after the other."""
    text = "".join(draw.sample(LETTERS, 4))
    names = [draw.choice(list(MOVES)) for _ in range(length - 1)]
    question, steps = " ".join([*names, text]), []
    for name in names:
        text = MOVES[name][wrong()](text)
        steps.append(text)
    return Solution(question, tuple(steps), text)


ACTIONS = {"walk": "W", "look": "K", "run": "U", "jump": "J", "crawl": "C", "dance": "D"}
TURNS = {"": "", "left": "L", "right": "R"}
TIMES = {"": 1, "twice": 2}


def instructions(draw: random.Random, length: int, wrong: Wrong) -> Solution:
    """`length` clauses in the manner of SCAN (arXiv 1711.00350), joined from left to right: "a then b" is a b, "a after b" is b a. Every
    step writes down all actions so far; a careless writer turns to the wrong side, or where there is none, counts wrong."""
    words, steps, done = [], [], ""
    for number in range(length):
        verb, turn, times, join = (draw.choice(list(kinds)) for kinds in (ACTIONS, TURNS, TIMES, ("then", "after")))
        words += [*([join] if number else []), *(word for word in (verb, turn, times) if word)]
        count = TIMES[times]
        if wrong():
            count = count if turn else count + 1
            turn = {"left": "right", "right": "left"}.get(turn, turn)
        actions = (TURNS[turn] + ACTIONS[verb]) * count
        done = actions + done if join == "after" and number else done + actions
        steps.append(done)
    return Solution(" ".join(words), tuple(steps), done)


FAMILIES: dict[str, Callable[[random.Random, int, Wrong], Solution]] = {"sums": sums, "letters": letters, "instructions": instructions}
SPLITS = ("test", "validation", "train")


def split_of(question: str) -> str:
    """An eighth of all questions is for the test, an eighth for choosing settings, the rest for training."""
    return SPLITS[min(2, hashlib.sha256(question.encode()).digest()[0] // 32)]


def problems(
    count: int, seed: str, split: str, lengths: tuple[int, ...] = (2, 3), careless: float = 0.0, style: str = "plain"
) -> Iterator[dict[str, str]]:
    """Draws distinct problems, families and lengths in turn.

    Args:
        count: how many.
        seed: of everything that is drawn.
        split: "train", "validation" or "test".
        lengths: steps of a problem.
        careless: share of solutions by the careless writer.
        style: how the working is written, see `written`.

    Yields:
        {"question", "answer"}: the layout of GSM8K.

    Raises:
        ValueError: there are not so many.
    """
    draw = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        family = list(FAMILIES.values())[len(seen) % len(FAMILIES)]
        length = lengths[len(seen) // len(FAMILIES) % len(lengths)]
        for _ in range(TRIES):
            solution = _drawn(draw, family, length, draw.random() < careless)
            if solution.question not in seen and split_of(solution.question) == split:
                break
        else:
            raise ValueError(f"{count} problems of {split} were asked for, there are about {len(seen)}: ask for fewer")
        seen.add(solution.question)
        yield {"question": solution.question, "answer": written(solution, style)}


def _drawn(draw: random.Random, family: Callable[[random.Random, int, Wrong], Solution], length: int, careless: bool) -> Solution:
    """A problem with the right solution, or with a wrong one where some step can go wrong: a sum may have nothing to carry."""
    state = draw.getstate()
    right = family(draw, length, lambda: False)
    errs, after = random.Random(draw.random()), draw.getstate()
    for _ in range(MISTAKES if careless else 0):
        # The same question: what is drawn for it does not depend on how it is answered.
        draw.setstate(state)
        found = family(draw, length, lambda: errs.random() < CARELESS_STEP)
        draw.setstate(after)
        if found.answer != right.answer:
            return found
    return right


STYLES = {"plain": ("{0}", ";", ""), "wordy": ("next {0}", " , ", "well , "), "verbose": ("we get {0}", " and so ", "let us see : ")}
"""How a step is written, what stands between two, and what before the first."""


def written(solution: Solution, style: str) -> str:
    """The working and the answer behind `####`, in a style of STYLES."""
    step, between, before = STYLES[style]
    return before + between.join(step.format(text) for text in solution.steps) + MARKER + solution.answer
