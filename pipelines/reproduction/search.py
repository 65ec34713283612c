"""Which setting an arm gets: the one with the most right answers to the validation problems of seed 0.

Test problems are no input of any stage here.

INPUT  search/ARM/trial-K/evaluation, of each setting tried
OUTPUT search/ARM/choice/trials.json: every setting with its accuracy, and the chosen one
"""

from collections.abc import Sequence
from typing import Any

from actors.settings import Objective, Training
from pipelines.reproduction.arms import Setting, described
from pipelines.run.artifacts import Run, Stage, write_json

CHOSEN = "chosen"
"""The role of a search among the inputs of a training stage."""


def plan(name: str, settings: Sequence[Setting], evaluations: Sequence[Stage]) -> Stage:
    """The stage that chooses among trials."""
    inputs = {f"trial-{number}": stage for number, stage in enumerate(evaluations)}
    return Stage(name, {"settings": [described(setting) for setting in settings]}, inputs, demand="the driver")


def choose(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
    """The work of these stages."""
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        accuracies = [(run.numbers(s)["accuracy"] if run.manifest(s) else None) for s in stage.inputs.values()]
        trials = [setting | {"accuracy": accuracy} for setting, accuracy in zip(stage.settings["settings"], accuracies, strict=True)]
        place = best(accuracies)
        if place is None:
            # The other arms go on.
            found[stage.name] = {"diverged": "training diverged with every setting tried: give the arm lower rates", "trials": trials}
        else:
            found[stage.name] = {"chosen": stage.settings["settings"][place], "accuracy": accuracies[place], "trials": trials}
        write_json(run.directory(stage) / "trials.json", found[stage.name])
    return found


def best(accuracies: Sequence[float | None]) -> int | None:
    """The place of the highest, the first among equals; None stands for a trial that diverged."""
    known = [(accuracy, -place) for place, accuracy in enumerate(accuracies) if accuracy is not None]
    return -max(known)[1] if known else None


def settled(base: Training) -> Any:
    """Returns what says with which settings a training stage runs: its own, with what a search chose in their place.

    Args:
        base: where work runs; what comes out of it stands in the stage.
    """

    def of(run: Run, stage: Stage) -> tuple[Training, Objective]:
        training, objective = dict(stage.settings["training"]), dict(stage.settings["objective"])
        if CHOSEN in stage.inputs:
            chosen = {name: value for name, value in run.numbers(stage.inputs[CHOSEN])["chosen"].items() if value is not None}
            training["learning_rate"] = chosen.pop("learning_rate")
            objective |= chosen
        where = base.model_dump(exclude=set(base.identity()))
        return Training(**(where | training)), Objective(**objective)

    return of
