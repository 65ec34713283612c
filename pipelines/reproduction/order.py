"""Hundreds of small stages in few calls: what is ready and of one kind is done together.

A call of work finds its pool of actors kept, or starts one in 5 to 10 s; a tiny model trains and answers in as much. So stages that do not
wait for each other, of all arms and seeds, share a call.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.run.artifacts import Run, Stage, Work

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A stage and the kind of its work."""

    kind: str
    stage: Stage


def follow(run: Run, steps: Sequence[Step], works: Mapping[str, Work], last: str, tolerant: Sequence[str] = ()) -> list[str]:
    """Runs all steps.

    Args:
        run: the run.
        steps: every stage that is wanted and all their inputs, in any order.
        works: by kind; kinds that come first here are done first when several are ready.
        last: the kind that is done only when nothing else is ready: what is dearest to start, and what gathers most while it waits.
        tolerant: kinds whose stages can do without inputs that are missing.

    Returns:
        the names of stages that could not run because training before them diverged.
    """
    waiting = {step.stage.name: step for step in steps}
    done: set[str] = set()
    dead: set[str] = set()
    order = [*(kind for kind in works if kind != last), last]

    def ready(step: Step) -> bool:
        names = {stage.name for stage in step.stage.inputs.values()}
        return names <= (done | dead if step.kind in tolerant else done)

    while waiting:
        for name in _doomed(waiting, dead, tolerant):
            del waiting[name]
            dead.add(name)
        kind = next((kind for kind in order if any(step.kind == kind and ready(step) for step in waiting.values())), None)
        if kind is None:
            assert not waiting, f"these wait for stages that nobody runs: {sorted(waiting)}"
            break
        stages = [step.stage for step in waiting.values() if step.kind == kind and ready(step)]
        run.do(works[kind], *stages)
        for stage in stages:
            del waiting[stage.name]
            why = run.numbers(stage).get("diverged")
            if why:
                log.warning("%s: %s", stage.name, why)
            (dead if why else done).add(stage.name)
    return sorted(dead)


def _doomed(waiting: Mapping[str, Step], dead: set[str], tolerant: Sequence[str]) -> list[str]:
    """Those that wait for what will never be."""
    return [
        name
        for name, step in waiting.items()
        if step.kind not in tolerant and any(stage.name in dead for stage in step.stage.inputs.values())
    ]
