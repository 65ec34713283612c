"""What a person should know before believing a run: found in what is on disk, while the run is going on or afterwards."""

import itertools
from collections.abc import Iterator

from actors.settings import Objective
from pipelines import measures, mt_bench, reward_training, summary, tasks, tournament
from pipelines.means import CUT, cut_off
from pipelines.report.facts import EVALUATED, Facts


def doubts(facts: Facts) -> list[str]:
    """All warnings, those of the job itself first, each once."""
    said = list(facts.summary["warnings"]) if facts.summary else []
    found = (_data(facts), _iterations(facts), _cut(facts), _rewards(facts), _evaluation(facts))
    return list(dict.fromkeys([*said, *itertools.chain.from_iterable(found)]))


def _data(facts: Facts) -> Iterator[str]:
    for name, numbers in (facts.data() | facts.prompts()).items():
        yield from summary.set_aside(name, numbers)


def _iterations(facts: Facts) -> Iterator[str]:
    objectives = {s.policy: s.settings["objective"] for s in facts.stages if s.name.endswith("/training") and "objective" in s.settings}
    for name, numbers in facts.trained().items():
        yield from summary.reward_warnings(name, dict(numbers), Objective.model_validate(objectives[name]))
        if pairs := facts.stage(f"{name}/pairs"):
            negatives = facts.stage(f"{name}/negatives") or {"rows": 0}
            yield from summary.doubts(name, summary.iteration_numbers(pairs, negatives, numbers), pairs["train"]["rows"])
    evaluated = [(name, numbers) for name, numbers in facts.evaluations().items() if name != "base"]
    for (before, first), (after, second) in itertools.pairwise(evaluated):
        if second["accuracy"] < first["accuracy"]:
            yield f"{after} is worse than {before}: {second['accuracy']:.3f} after {first['accuracy']:.3f}"


def _cut(facts: Facts) -> Iterator[str]:
    for name, found in facts.lengths.items():
        if found.truncated > CUT and "base" not in name.split("/"):
            own = name.removeprefix(EVALUATED)
            yield cut_off(own, found.truncated, "max_new_tokens" if own == name else "answers.max_new_tokens")


def _rewards(facts: Facts) -> Iterator[str]:
    for name, numbers in facts.stage("rewards/metrics").items():
        yield from reward_training.doubts(name, numbers)


def _evaluation(facts: Facts) -> Iterator[str]:
    found = facts.scoreboard()
    yield from measures.doubts(found["measures"])
    yield from tasks.doubts(found["tasks"])
    if found["tournament"]:
        yield from tournament.doubts(found["tournament"])
    if found["mt_bench"]:
        yield from mt_bench.doubts(found["mt_bench"])
