"""Test the papers' claims at small scale: models trained from scratch on problems with checkable answers, many arms, seeds and error bars.

    python jobs/reproduce.py [--config jobs/configs/reproduce_quick.yaml] [--section.key value ...] [--dry-run]

    random weights --> pre-training on a partly wrong corpus --> SFT on few right demonstrations --> every arm
                                                                   |
                       seed 0, validation problems:  search for every arm's settings
                       every seed, test problems:    the chosen setting, once          --> tables/*/{table.md,figure.png}

All arms and seeds are stages of one run: what they share is made once, and the same command continues what was stopped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import runner
from jobs.schemas import ReproduceConfig
from pipelines import best_of_n, evaluation, generation, reference, reward_training, scoring
from pipelines.reproduction import arms, data, order, plans, search, tables, tiny, training_pool
from pipelines.reproduction.graph import Builder
from pipelines.run.artifacts import Run, Stage, StageError, write_json
from pipelines.tables import Shown, Table


@dataclass(frozen=True)
class Graph:
    """All stages of the job."""

    steps: tuple[order.Step, ...]
    tables: dict[str, Stage]

    def stages(self) -> list[Stage]:
        """In the order in which they were planned: each after its inputs."""
        return [step.stage for step in self.steps]

    def reported(self) -> list[Stage]:
        """What the arms have in common, and the tables: a page of every arm of every seed nobody could read."""
        shared = [stage for stage in self.stages() if stage.name.endswith(("/blank", "/pretraining/training", "/sft/training"))]
        return [*shared, *self.tables.values()]


def plan(config: ReproduceConfig) -> Graph:
    """The job graph with all fingerprints; nothing runs.

    Raises:
        StageError: there is no arm of a name.
    """
    known = [arm.name for arm in (*arms.GSIL, *arms.DIL)]
    if unknown := sorted({*(config.scope.arms or ())} - {*known}):
        raise StageError(f"scope.arms: there is no {unknown[0]!r}; there are {', '.join(dict.fromkeys(known))}")
    builder = Builder(config)
    seeds = [builder.seed(number) for number in range(config.scope.seeds)]
    made = {name: plans.PLANS[name](builder, seeds) for name in config.scope.tables}
    return Graph(tuple(builder.steps.values()), made)


def reproduce(config: ReproduceConfig, graph: Graph, run: Run) -> dict[str, Any]:
    """Runs the job.

    Returns:
        what went into summary.json.
    """
    longest = config.model.context
    works = {
        "model": tiny.prepare(config.model),
        "blank": tiny.draw_blanks(config.model),
        "problems": data.write,
        "evaluation": evaluation.evaluate,
        "choice": search.choose,
        "preferences": data.write_preferences,
        "reward_pairs": reward_training.make_pairs,
        "best_of_n": best_of_n.choose,
        "tables": tables.make,
        "samples": generation.sample(config.engine, longest, False),
        "pairs": reference.score(config.scoring, config.training.precision, longest, False),
        "scores": scoring.score(config.scoring, longest, False),
        "training": training_pool.train(config.workers, search.settled(config.training), longest),
    }
    diverged = order.follow(run, graph.steps, works, last="training", tolerant=("choice", "tables"))
    found = {name: run.numbers(stage) for name, stage in graph.tables.items()}
    content = {
        "run": run.root.name,
        "seeds": config.scope.seeds,
        "tables": found,
        "diverged": diverged,
        "warnings": [f"{name} could not run: training before it diverged" for name in diverged],
        "stages": run.log,
        "total_seconds": round(sum(stage["seconds"] for stage in run.log), 1),
    }
    write_json(run.root / ReproduceConfig.file("summary.json"), content)
    return content


def show(content: dict[str, Any], root: Path) -> Shown:
    """The final tables."""
    shown = [
        Table(f"{content['run']}: {name}, {content['seeds']} seeds, right answers in percent", numbers["rows"])
        for name, numbers in content["tables"].items()
    ]
    return Shown(shown, [f"tables and figures: {root / 'tables'}", f"summary: {root / ReproduceConfig.file('summary.json')}"])


if __name__ == "__main__":
    sys.exit(runner.main(ReproduceConfig, sys.argv[1:], __doc__ or "", plan, reproduce, show, Graph.reported))
