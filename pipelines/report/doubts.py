"""What a person should know before believing a run: found in what is on disk, while the run is going on or afterwards."""

import itertools
from collections.abc import Iterator

from actors.settings import Objective
from pipelines import mt_bench, reward_training, summary, tournament
from pipelines.means import CUT, cut_off
from pipelines.report.facts import EVALUATED, Facts


def doubts(facts: Facts) -> list[str]:
    """All warnings, those of the job itself first, each once."""
    said = list(facts.summary["warnings"]) if facts.summary else []
    return list(dict.fromkeys([*said, *_iterations(facts), *_cut(facts), *_rewards(facts), *_judge(facts)]))


def _iterations(facts: Facts) -> Iterator[str]:
    objectives = {s.policy: s.settings["objective"] for s in facts.stages if s.name.endswith("/training") and "objective" in s.settings}
    for name, numbers in facts.trained().items():
        yield from summary.reward_warnings(name, dict(numbers), Objective.model_validate(objectives[name]))
    evaluated = [(name, numbers) for name, numbers in facts.evaluations().items() if name != "base"]
    for (before, first), (after, second) in itertools.pairwise(evaluated):
        if second["accuracy"] < first["accuracy"]:
            yield f"{after} is worse than {before}: {second['accuracy']:.3f} after {first['accuracy']:.3f}"


def _cut(facts: Facts) -> Iterator[str]:
    for name, found in facts.lengths.items():
        if found.truncated > CUT and "base" not in name.split("/"):
            yield cut_off(name.removeprefix(EVALUATED), found.truncated)


def _rewards(facts: Facts) -> Iterator[str]:
    for name, numbers in facts.stage("rewards/metrics").items():
        yield from reward_training.doubts(name, numbers)


def _judge(facts: Facts) -> Iterator[str]:
    if found := facts.stage("evaluation/tournament/games"):
        yield from tournament.doubts(found)
    if found := facts.stage("evaluation/mt_bench/grades"):
        yield from mt_bench.doubts(found)
