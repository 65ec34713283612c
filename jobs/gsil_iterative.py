"""Align a language model from demonstrations: SFT, then iterated self-play (GSIL, arXiv 2410.10093).

    python jobs/gsil_iterative.py --config jobs/configs/quickstart.yaml [--section.key value ...] [--dry-run]

    demonstrations ----> SFT --> policy 0
                          |
          for t = 1..T:   v
            negatives  y_g ~ policy t-1           Ray Data + vLLM     (the same engines answer the held-out prompts)
            pairs      log pi_ref(y_r), (y_g)     Ray Data            (equal pairs are dropped)
            training   classify y_r against y_g   Ray Train + DeepSpeed --> policy t

The same command continues a run that was stopped, and redoes only what a changed setting touches.
"""

import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.config import GsilConfig, parse, to_yaml
from pipelines import base_model, cluster, demonstrations, evaluation, generation, policy_training, reference, summary
from pipelines.artifacts import Run, Stage, locked, write_json

log = logging.getLogger("gsil")


@dataclass(frozen=True)
class Policy:
    """A policy and its evaluation."""

    name: str
    weights: Stage
    samples: Stage
    evaluation: Stage


@dataclass(frozen=True)
class Iteration:
    """The stages that make one policy from the one before."""

    negatives: Stage
    pairs: Stage
    policy: Policy


@dataclass(frozen=True)
class Graph:
    """All stages of the job, in order."""

    base_model: Stage
    demonstrations: Stage
    base: Policy
    sft: Policy
    iterations: tuple[Iteration, ...]

    def stages(self) -> list[Stage]:
        """In the order in which they run."""
        order = [self.base_model, self.demonstrations, self.base.samples, self.base.evaluation, self.sft.weights]
        last = self.sft
        for step in self.iterations:
            order += [last.samples, step.negatives, last.evaluation, step.pairs, step.policy.weights]
            last = step.policy
        return [*order, last.samples, last.evaluation]


def plan(config: GsilConfig) -> Graph:
    """The job graph with all fingerprints; nothing runs."""
    base = base_model.plan(config.model)
    data = demonstrations.plan(config.demonstrations, base)

    def policy(name: str, weights: Stage) -> Policy:
        sampling = config.evaluation.sampling()
        samples = generation.plan(f"{name}/samples", weights, base, data, sampling, config.engine, 0, {"held_out": None})
        return Policy(name, weights, samples, evaluation.plan(f"{name}/evaluation", samples, data, config.evaluation))

    sft = policy("sft", policy_training.plan("sft/training", base, base, data, config.sft, config.sft.objective()))
    policies, negatives, iterations = [sft], [], []
    for t in range(1, config.iterations.count + 1):
        name, previous = f"iteration-{t}", policies[-1].weights
        prompts = {"train": None, "held_out": config.evaluation.pairs}
        negatives.append(generation.plan(f"{name}/negatives", previous, base, data, config.negatives, config.engine, t, prompts))
        ref = previous if config.iterations.reference == "previous" else sft.weights
        start = previous if config.iterations.start_from == "previous" else sft.weights
        window = tuple(negatives[-config.iterations.negatives_window :])
        pairs = reference.plan(
            f"{name}/pairs", data, window, ref, config.negatives.truncated, config.training, config.objective, config.scoring
        )
        trained = policy_training.plan(f"{name}/training", start, base, pairs, config.training, config.objective)
        policies.append(policy(name, trained))
        iterations.append(Iteration(negatives[-1], pairs, policies[-1]))
    return Graph(base, data, policy("base", base), sft, tuple(iterations))


def align(config: GsilConfig, graph: Graph, run: Run) -> dict[str, Any]:
    """Runs the job. This is the algorithm.

    Returns:
        what went into summary.json.
    """
    trust = config.model.trust_remote_code
    sample = generation.sample(config.engine, config.max_model_len(), trust)
    score = reference.score(config.scoring, config.training, trust)
    result = Result(config, graph, run)

    run.do(base_model.prepare(config.model), graph.base_model)
    base_model.check_context(run, graph.base_model, config.longest())
    run.do(demonstrations.prepare(config.demonstrations, trust), graph.demonstrations)
    run.do(sample, graph.base.samples)
    run.do(evaluation.evaluate, graph.base.evaluation)
    run.do(policy_training.train(config.sft, config.sft.objective(), config.tracking, trust), graph.sft.weights)
    policy = graph.sft
    for step in graph.iterations:
        run.do(sample, policy.samples, step.negatives)
        run.do(evaluation.evaluate, policy.evaluation)
        if result.should_stop(policy):
            break
        run.do(score, step.pairs)
        if result.nothing_left(step):
            break
        run.do(policy_training.train(config.training, config.objective, config.tracking, trust), step.policy.weights)
        result.add(step)
        policy = step.policy
    run.do(sample, policy.samples)
    run.do(evaluation.evaluate, policy.evaluation)
    result.should_stop(policy)
    return result.write()


class Result:
    """Gathers the numbers of finished stages; decides when to stop and which policy is final."""

    def __init__(self, config: GsilConfig, graph: Graph, run: Run):
        self.config, self.graph, self.run = config, graph, run
        self.trained: list[Policy] = [graph.sft]
        self.iterations: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.stopped: str | None = None

    def add(self, step: Iteration) -> None:
        """An iteration was trained."""
        stages = (step.pairs, step.negatives, step.policy.weights)
        pairs, negatives, training = (self.run.numbers(stage) for stage in stages)
        self.trained.append(step.policy)
        self.iterations.append(summary.iteration_numbers(pairs, negatives, training))
        for text in summary.reward_warnings(step.policy.name, training, self.config.objective.gamma):
            self.warn(text)

    def should_stop(self, policy: Policy) -> bool:
        """Whether `policy`, just evaluated, is worse than the one before, or its pairs could not be told apart."""
        if policy is not self.graph.sft and self.stopped is None:
            accuracy, before = (self.run.numbers(p.evaluation)["accuracy"] for p in (policy, self.trained[-2]))
            if accuracy is not None and accuracy < before:
                self.warn(f"{policy.name} is worse than {self.trained[-2].name}: {accuracy:.3f} after {before:.3f}")
                if self.config.iterations.stop_when_worse:
                    self.stopped = f"{policy.name}: the held-out metric fell"
            if self.config.iterations.stop_when_indistinguishable and summary.indistinguishable(self.iterations[-1]):
                accuracy = self.iterations[-1]["classification_accuracy"]
                self.stopped = self.stopped or f"{policy.name}: held-out pairs are told apart no better than by chance ({accuracy:.3f})"
        return self.stopped is not None

    def nothing_left(self, step: Iteration) -> bool:
        """Whether no pair is left to train on."""
        if self.run.numbers(step.pairs)["train"]["rows"]:
            return False
        self.stopped = f"{step.policy.name}: every sample equals its demonstration or was dropped, nothing is left to tell apart"
        return True

    def warn(self, text: str) -> None:
        """To the log and to the summary, once."""
        if text not in self.warnings:
            self.warnings.append(text)
            log.warning(text)

    def write(self) -> dict[str, Any]:
        """Writes final/ and summary.json."""
        evaluations = {p.name: self.run.numbers(p.evaluation) for p in (self.graph.base, *self.trained)}
        best = max(self.trained, key=lambda p: (evaluations[p.name]["accuracy"] or 0.0, self.trained.index(p)))
        chosen = best if self.config.evaluation.metric != "none" else self.trained[-1]
        content = {
            "run": self.config.run.name,
            "policies": {name: {key: numbers[key] for key in ("accuracy", "stderr", "n")} for name, numbers in evaluations.items()},
            "iterations": self.iterations,
            "final": chosen.name,
            "stopped": self.stopped if len(self.iterations) < self.config.iterations.count else None,
            "warnings": self.warnings,
            "demonstrations": self.run.numbers(self.graph.demonstrations),
            "stages": self.run.log,
            "total_seconds": round(sum(stage["seconds"] for stage in self.run.log), 1),
        }
        summary.write_final(
            self.run, chosen.name, chosen.weights, summary.model_card(self.config.model_dump(mode="json"), content, chosen.name)
        )
        write_json(self.run.root / "summary.json", content)
        return content


def dry_run(config: GsilConfig, graph: Graph, root: Path) -> None:
    """Prints the resolved config and the stages; starts nothing."""
    run = Run(root)
    print(to_yaml(config))
    print(f"stages of {root}:")
    for stage in graph.stages():
        state = "done" if run.manifest(stage) else "to do"
        print(f"  {stage.fingerprint}  {state:5}  {stage.name:24}  {stage.demand}")


def main(argv: list[str]) -> int:
    """Runs the job; returns the exit status."""
    asked = parse(GsilConfig, argv, usage=__doc__ or "")
    config = asked.config
    root = config.run.directory()
    try:
        graph = plan(config)
        if asked.dry_run:
            dry_run(config, graph, root)
            return 0
        with locked(root):
            execute(config, graph, root)
        return 0
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command continues {root}", file=sys.stderr)
        return 130
    except Exception as error:
        known = cluster.person_can_mend(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        return 1


def execute(config: GsilConfig, graph: Graph, root: Path) -> None:
    """Connects to Ray and runs the job in its directory with a display."""
    from pipelines.progress import Terminal, chatter_to, print_result, set_up_logs

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    (root / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    summary.remove_stale_summary(root)
    with chatter_to(root / "logs" / "driver.log") as console, Terminal(console) as display:
        set_up_logs(root / "logs", display)
        display.say(f"{config.run.name}: {root}")
        with cluster.connected(config.ray) as logs:
            display.say(f"logs: {root / 'logs'}, and of Ray, vLLM and DeepSpeed: {logs}")
            cluster.check_fits(config.ray.address, config.demands())
            result = align(config, graph, Run(root, display))
    print_result(result, root)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
