"""What an evaluation found, as tables for a person; for the terminal and for the report."""

from collections.abc import Mapping
from typing import Any

from pipelines import measures, mt_bench, tournament
from pipelines.lmeval import catalogue
from pipelines.means import cell


def tables(found: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Tables by title; the header first.

    Args:
        found: numbers of stages under "measures", "tasks" (both by policy), "tournament" and "mt_bench"; nothing where there is none.
    """
    shown: dict[str, list[list[str]]] = {}
    if found.get("measures"):
        shown["Answers to the prompts"] = measures.table(found["measures"])
    if any(found.get("tasks", {}).values()):
        shown["Tasks"] = tasks(found["tasks"])
    if found.get("tournament"):
        shown |= tournament.tables(found["tournament"])
    if found.get("mt_bench"):
        shown |= mt_bench.tables(found["mt_bench"])
    return shown


def tasks(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Every policy's main metric of every task; the header first."""
    names = list(dict.fromkeys(task for done in found.values() for task in done))
    example = {task: next(done[task] for done in found.values() if task in done) for task in names}
    header = [
        f"{task} ({_shots(example[task]['shots'])}, {example[task]['main'] or 'no metric of all its tasks'}, n={example[task]['n']})"
        for task in names
    ]
    return [["policy", *header], *([name, *(_value(done.get(task)) for task in names)] for name, done in found.items())]


def shares(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[float | None, int]]:
    """The main metrics of tasks that are shares of the rows, each with how many it is over; for `pipelines.means.ends`."""
    numbers = [each for done in found.values() for each in done.values() if each["main"]]
    return [(each["metrics"][each["main"]]["value"], each["n"]) for each in numbers if each["main"].split(",")[0] in catalogue.FIRST]


def _shots(number: int | None) -> str:
    """The tasks of a group may have different ones."""
    return "its shots" if number is None else f"{number} shots"


def _value(numbers: Mapping[str, Any] | None) -> str:
    if not numbers or not numbers["main"]:
        return ""
    main = numbers["metrics"][numbers["main"]]
    return cell(main["value"], main.get("stderr"), 3)
