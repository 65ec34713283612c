"""Align a language model from preference pairs (DIL, ICLR 2025: imitation learning of the chosen responses by density ratios).

    python jobs/dil.py --demonstrations.path PAIRS [--objective.name dil_lsif | dil_ukl | dil_bce | dpo | ...] [--section.key value ...]

    pairs ----> [SFT on the chosen] --> log pi_ref(chosen), (rejected) --> training --> policy
                 demonstrations.sft_first      Ray Data                    Ray Train + DeepSpeed

A row has a prompt, a chosen and a rejected response, in any of the usual layouts: prompt/chosen/rejected, whole conversations that
share their start, HH text. The same command continues a run that was stopped, and redoes only what a changed setting touches.
"""

import logging
import sys
from dataclasses import dataclass
from typing import Any

from jobs import runner
from jobs.schemas import DilConfig
from pipelines import base_model, demonstrations, evaluation, generation, policy_training, reference, summary
from pipelines.run.artifacts import Run, Stage

log = logging.getLogger("gsil")


@dataclass(frozen=True)
class Graph:
    """All stages of the job."""

    base_model: Stage
    demonstrations: Stage
    sft: Stage | None
    pairs: Stage
    training: Stage
    evaluations: dict[str, tuple[Stage, Stage]]
    """samples and evaluation of each policy, where a metric was asked for"""

    def stages(self) -> list[Stage]:
        """In the order in which they run."""
        trained = [*([self.sft] if self.sft else []), self.pairs, self.training]
        return [self.base_model, self.demonstrations, *trained, *(stage for pair in self.evaluations.values() for stage in pair)]


def plan(config: DilConfig) -> Graph:
    """The job graph with all fingerprints; nothing runs."""
    base = base_model.plan(config.model)
    data = demonstrations.plan(config.demonstrations, base)
    sft = None
    if config.demonstrations.sft_first:
        sft = policy_training.plan("sft/training", base, base, data, config.sft, config.sft.objective())
    start = sft or base
    pairs = reference.plan("dil/pairs", data, (), start, "keep", config.training, config.objective, config.scoring)
    training = policy_training.plan("dil/training", start, base, pairs, config.training, config.objective)
    evaluations = {}
    if config.evaluation.metric != "none":
        before = None
        for name, weights in {"base": base, "sft": sft, "dil": training}.items():
            if weights:
                sampling = config.evaluation.sampling()
                samples = generation.plan(f"{name}/samples", weights, base, data, sampling, config.sampler(), 0, {"held_out": None})
                before = evaluation.plan(f"{name}/evaluation", samples, data, config.evaluation, before)
                evaluations[name] = (samples, before)
    return Graph(base, data, sft, pairs, training, evaluations)


def align(config: DilConfig, graph: Graph, run: Run) -> dict[str, Any]:
    """Runs the job.

    Returns:
        what went into summary.json.
    """
    trust, longest = config.model.trust_remote_code, max(config.longest().values())
    run.do(base_model.prepare(config.model), graph.base_model)
    base_model.check(run, graph.base_model, config.longest(), {"sft": config.sft, "training": config.training})
    run.do(demonstrations.prepare(config.demonstrations, trust), graph.demonstrations)
    if config.evaluation.metric != "none":
        evaluation.check_answers(run, graph.demonstrations, "evaluation.metric", config.evaluation.metric, "set evaluation.metric=none")
    if graph.sft:
        run.do(policy_training.train(config.sft, config.tracking, longest, trust), graph.sft)
    run.do(reference.score(config.scoring, config.training.precision, longest, trust), graph.pairs)
    run.do(policy_training.train(config.training, config.tracking, longest, trust), graph.training)
    for samples, score in graph.evaluations.values():
        run.do(generation.sample(config.sampler(), longest, trust), samples)
        run.do(evaluation.evaluate, score)
    return _summary(config, graph, run)


def _summary(config: DilConfig, graph: Graph, run: Run) -> dict[str, Any]:
    unknown = {"accuracy": None, "stderr": None, "n": 0}
    names = ["base", *(["sft"] if graph.sft else []), "dil"]
    scores = {name: run.numbers(graph.evaluations[name][1]) if name in graph.evaluations else unknown for name in names}
    pairs, training = run.numbers(graph.pairs), run.numbers(graph.training)
    numbers = summary.iteration_numbers(pairs, {"rows": pairs["train"]["rows"]}, training)
    drawn = [text for samples, _ in graph.evaluations.values() for text in summary.cut(samples.name, run.numbers(samples))]
    warnings = [text for text in drawn if not text.startswith("base/")] + summary.reward_warnings("dil", training, config.objective)
    warnings += summary.doubts("dil", numbers, pairs["train"]["rows"])
    for text in warnings:
        log.warning(text)
    content = summary.content(run, scores, [numbers], "dil", None, warnings, run.numbers(graph.demonstrations))
    return summary.write(run, config.model_dump(mode="json"), content, graph.training)


if __name__ == "__main__":
    sys.exit(runner.main(DilConfig, sys.argv[1:], __doc__ or "", plan, align))
