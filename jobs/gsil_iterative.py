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
import sys
from dataclasses import dataclass
from typing import Any

from jobs import runner
from jobs.schemas import GsilConfig
from pipelines import base_model, demonstrations, evaluation, generation, policy_training, reference, summary
from pipelines.run.artifacts import Run, Stage

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
        order = [self.base_model, self.demonstrations, self.base.samples, self.base.evaluation]
        if self.sft.weights is not self.base_model:
            order.append(self.sft.weights)
        last = self.sft
        for step in self.iterations:
            order += [last.samples, step.negatives, last.evaluation, step.pairs, step.policy.weights]
            last = step.policy
        return [*order, last.samples, last.evaluation]


def plan(config: GsilConfig) -> Graph:
    """The job graph with all fingerprints; nothing runs."""
    base = base_model.plan(config.model)
    data = demonstrations.plan(config.demonstrations, base)

    def policy(name: str, weights: Stage, before: Policy | None = None) -> Policy:
        sampling = config.evaluation.sampling()
        samples = generation.plan(f"{name}/samples", weights, base, data, sampling, config.sampler(), 0, {"held_out": None})
        earlier = before.evaluation if before else None
        return Policy(name, weights, samples, evaluation.plan(f"{name}/evaluation", samples, data, config.evaluation, earlier))

    fine_tuned = policy_training.plan("sft/training", base, base, data, config.sft, config.sft.objective())
    # Without an epoch of it the base model is the SFT policy.
    initial = policy("base", base)
    sft = policy("sft", fine_tuned if config.sft.epochs else base, initial)
    policies, negatives, iterations = [sft], [], []
    for t in range(1, config.iterations.count + 1):
        name, previous = f"iteration-{t}", policies[-1].weights
        prompts = {"train": None, "held_out": config.evaluation.pairs}
        negatives.append(generation.plan(f"{name}/negatives", previous, base, data, config.negatives, config.sampler(), t, prompts))
        ref = previous if config.iterations.reference == "previous" else sft.weights
        start = previous if config.iterations.start_from == "previous" else sft.weights
        window = tuple(negatives[-config.iterations.negatives_window :])
        pairs = reference.plan(
            f"{name}/pairs", data, window, ref, config.negatives.truncated, config.training, config.objective, config.scoring
        )
        trained = policy_training.plan(f"{name}/training", start, base, pairs, config.training, config.objective)
        policies.append(policy(name, trained, policies[-1]))
        iterations.append(Iteration(negatives[-1], pairs, policies[-1]))
    return Graph(base, data, initial, sft, tuple(iterations))


def align(config: GsilConfig, graph: Graph, run: Run) -> dict[str, Any]:
    """Runs the job. This is the algorithm.

    Returns:
        what went into summary.json.
    """
    trust = config.model.trust_remote_code
    sample = generation.sample(config.sampler(), config.max_model_len(), trust)
    longest = max(config.longest().values())
    score = reference.score(config.scoring, config.training.precision, longest, trust)
    result = Result(config, graph, run)

    run.do(base_model.prepare(config.model), graph.base_model)
    base_model.check(run, graph.base_model, config.longest(), {"sft": config.sft, "training": config.training})
    run.do(demonstrations.prepare(config.demonstrations, trust), graph.demonstrations)
    if config.evaluation.metric != "none":
        instead = "set evaluation.metric=none and iterations.stop_when_worse=false"
        evaluation.check_answers(run, graph.demonstrations, "evaluation.metric", config.evaluation.metric, instead)
    # Without SFT the first negatives are the base model's, too: one start of the engines serves all.
    first = () if config.sft.epochs else (graph.sft.samples, *(step.negatives for step in graph.iterations[:1]))
    run.do(sample, graph.base.samples, *first)
    run.do(evaluation.evaluate, graph.base.evaluation)
    if config.sft.epochs:
        run.do(policy_training.train(config.sft, config.tracking, longest, trust), graph.sft.weights)
    policy = graph.sft
    for step in graph.iterations:
        run.do(sample, policy.samples, step.negatives)
        run.do(evaluation.evaluate, policy.evaluation)
        if result.should_stop(policy):
            break
        run.do(score, step.pairs)
        if result.nothing_left(step):
            break
        run.do(policy_training.train(config.training, config.tracking, longest, trust), step.policy.weights)
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
        told = summary.reward_warnings(step.policy.name, training, self.config.objective)
        for text in (
            *told,
            *summary.doubts(step.policy.name, self.iterations[-1], pairs["train"]["rows"]),
        ):
            self.warn(text)

    def should_stop(self, policy: Policy) -> bool:
        """Whether `policy`, just evaluated, is worse than the one before, or its pairs could not be told apart. Iterations go on from an
        SFT policy that is worse than the base model: it is what they are there to mend."""
        for text in summary.cut(policy.samples.name, self.run.numbers(policy.samples)):
            self.warn(text)
        accuracies = [self.run.numbers(p.evaluation)["accuracy"] for p in (self.graph.base, self.graph.sft)]
        if policy is self.graph.sft and accuracies[1] is not None and accuracies[1] < accuracies[0]:
            self.warn(f"sft is worse than base: {accuracies[1]:.3f} after {accuracies[0]:.3f}; final/ is the best of the trained policies")
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
        for text in summary.cut(step.negatives.name, self.run.numbers(step.negatives)):
            self.warn(text)
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
        stopped = self.stopped if len(self.iterations) < self.config.iterations.count else None
        data = self.run.numbers(self.graph.demonstrations)
        content = summary.content(self.run, evaluations, self.iterations, chosen.name, stopped, self.warnings, data)
        return summary.write(self.run, self.config.model_dump(mode="json"), content, chosen.weights)


if __name__ == "__main__":
    sys.exit(runner.main(GsilConfig, sys.argv[1:], __doc__ or "", plan, align))
