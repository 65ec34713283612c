"""Learn reward models from demonstrations alone, and choose the best of N by them (AfD, arXiv 2405.15624).

    python jobs/irl_reward.py --config jobs/configs/irl_arithmetic.yaml [--section.key value ...] [--dry-run]

    demonstrations --> SFT --> sft/responses, base/responses     K samples a prompt        Ray Data + vLLM
                                |
      init-sft   sft/responses  against base/responses  --.
      init-demo  demonstrations against base/responses    |--> reward models               Ray Train + DeepSpeed
      sft-demo   demonstrations against sft/responses     |
      bt         preference pairs                       --'
                                |
    held-out prompts --> N samples of the SFT policy --> rewards and golden scores --> the best, and a report against N

The same command continues a run that was stopped. In the run directory of `gsil_iterative.py`, with the same model, demonstrations and
sft settings, it goes on from that job's SFT policy.
"""

import itertools
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.settings import Sampling
from jobs import runner
from jobs.schemas import IrlConfig
from pipelines import (
    base_model,
    best_of_n,
    best_of_n_report,
    demonstrations,
    evaluation,
    generation,
    policy_training,
    reward_training,
    scoring,
)
from pipelines.run.artifacts import Run, Stage, write_json
from pipelines.tables import Shown, Table

log = logging.getLogger("gsil")


@dataclass(frozen=True)
class Policy:
    """The SFT policy and what it and the base policy answer."""

    training: Stage
    base_responses: Stage
    """K samples a prompt of the base policy"""
    responses: Stage
    """and of the SFT policy"""
    base_greedy: Stage
    greedy: Stage
    many: Stage
    """N samples a prompt"""


@dataclass(frozen=True)
class Reward:
    """A reward model and what it learns from."""

    name: str
    kind: str
    pairs: Stage
    training: Stage


@dataclass(frozen=True)
class Graph:
    """All stages of the job."""

    base: Stage
    demonstrations: Stage
    preferences: Stage | None
    """preference pairs, where they were given"""
    policy: Policy | None
    """unless a reward model of given preference pairs is all that is wanted"""
    labels: Stage | None
    """golden scores of the K samples, where preference pairs are made of them"""
    rewards: tuple[Reward, ...]
    metrics: Stage
    scores: tuple[tuple[Stage, ...], ...]
    """golden ones, and those of the N samples by every reward model; a tuple for each scorer"""
    choice: Stage | None

    def samples(self) -> tuple[list[Stage], list[Stage]]:
        """Stages of the base policy's samples and of the SFT policy's; what nobody would read is not drawn."""
        if not self.policy:
            return [], []
        judged = self.choice is not None and "golden" in self.choice.inputs
        learned_from = any(reward.kind.startswith("init") for reward in self.rewards)
        base = [*([self.policy.base_responses] if learned_from else []), *([self.policy.base_greedy] if judged else [])]
        sft = [self.policy.responses, *([self.policy.greedy] if judged else []), *([self.policy.many] if self.choice else [])]
        return base, sft

    def stages(self) -> list[Stage]:
        """In the order in which they run."""
        data = [self.base, *([self.demonstrations] if self.policy else []), *([self.preferences] if self.preferences else [])]
        base, sft = self.samples()
        sampled = [self.policy.training, *base, *sft] if self.policy else []
        labels = [self.labels] if self.labels else []
        learned = [*self.pairs(), *(reward.training for reward in self.rewards), self.metrics]
        scores = [stage for stages in self.scores for stage in stages]
        return [*data, *sampled, *labels, *learned, *scores, *([self.choice] if self.choice else [])]

    def pairs(self) -> list[Stage]:
        """Stages of the pairs of all kinds, once each."""
        return list({reward.kind: reward.pairs for reward in self.rewards}.values())


def plan(config: IrlConfig) -> Graph:
    """The job graph with all fingerprints; nothing runs."""
    base = base_model.plan(config.model)
    data = demonstrations.plan(config.demonstrations, base)
    policy = _policy(config, base, data) if config.needs_policy() else None

    def score(name: str, given: Stage, scorer: Stage | str, *splits: str) -> Stage:
        return scoring.plan(name, given, data, scorer, config.training.precision, config.scoring, splits or ("held_out", "train"))

    preferences, labels, sides = None, None, {}
    if policy:
        sides["init-sft"] = policy.responses, policy.base_responses
        sides["init-demo"] = data, policy.base_responses
        sides["sft-demo"] = data, policy.responses
        sides["bt"] = policy.responses, policy.responses
    if config.given_preferences():
        preferences = demonstrations.plan(config.preferences, base)
        sides["bt"] = preferences, preferences
    elif policy and "bt" in config.rewards.kinds:
        labels = score("rewards/bt/labels", policy.responses, config.best_of_n.golden)

    rewards = []
    for kind in config.rewards.kinds:
        pairs = reward_training.plan_pairs(f"rewards/{kind}/pairs", *sides[kind], labels if kind == "bt" else None)
        start = policy.training if policy and config.rewards.start_from == "sft" else base
        centre = policy.responses if policy else pairs.inputs["positives"]
        for seed in range(config.rewards.seeds):
            training = config.training.model_copy(update={"seed": config.training.seed + seed})
            objective = reward_training.objective(config.rewards.loss_of(kind))
            trained = policy_training.plan(f"rewards/{kind}/seed-{seed}", start, base, pairs, training, objective, centre)
            rewards.append(Reward(f"{kind}-{seed}", kind, pairs, trained))
    metrics = reward_training.plan_metrics({reward.name: reward.training for reward in rewards})
    head = Graph(base, data, preferences, policy, labels, tuple(rewards), metrics, (), None)
    if not config.best_of_n.asked() or not policy:
        return head

    golden, judge = None, config.best_of_n.golden
    if judge != "none" and "held_out" in config.best_of_n.asked():
        golden = best_of_n.Golden.by(score, judge, policy.many, policy.greedy, policy.base_greedy, data)
    scores = {reward.name: score(f"best_of_n/{reward.name}", policy.many, reward.training) for reward in rewards}
    for number, scorer in enumerate(config.best_of_n.scorers, start=1):
        scores[scorer] = score(f"best_of_n/scorer-{number}", policy.many, scorer)
    selectors = {kind: [reward.name for reward in rewards if reward.kind == kind] for kind in config.rewards.kinds}
    if config.rewards.seeds > 1:
        # Beside what they decide together, each alone: over-optimisation of one is what an ensemble guards against.
        selectors |= {reward.name: [reward.name] for reward in rewards}
    selectors |= {scorer: [scorer] for scorer in config.best_of_n.scorers}
    if config.rewards.ensemble:
        selectors["ensemble"] = [reward.name for reward in rewards if reward.kind in config.rewards.ensemble]
    choice = best_of_n.plan(policy.many, golden, scores, selectors, config.chooser(), config.rewards.rule())
    return replace(head, scores=(*([golden.stages()] if golden else []), *((stage,) for stage in scores.values())), choice=choice)


def _policy(config: IrlConfig, base: Stage, data: Stage) -> Policy:
    sft = policy_training.plan("sft/training", base, base, data, config.sft, config.sft.objective())

    def sample(name: str, policy: Stage, sampling: Sampling, prompts: dict[str, int | None], draw: int = 0) -> Stage:
        return generation.plan(name, policy, base, data, sampling, config.sampler(), draw, prompts)

    return Policy(
        training=sft,
        base_responses=sample("base/responses", base, config.responses.sampling(), config.responses.prompts()),
        responses=sample("sft/responses", sft, config.responses.sampling(), config.responses.prompts()),
        base_greedy=sample("best_of_n/greedy-base", base, config.best_of_n.greedy(), {"held_out": config.best_of_n.prompts}),
        greedy=sample("best_of_n/greedy", sft, config.best_of_n.greedy(), {"held_out": config.best_of_n.prompts}),
        # Other draws than those that the reward models learned from.
        many=sample("best_of_n/samples", sft, config.best_of_n.sampling(), config.best_of_n.asked(), draw=1),
    )


def learn(config: IrlConfig, graph: Graph, run: Run) -> dict[str, Any]:
    """Runs the job.

    Returns:
        what went into reward-summary.json.
    """
    trust, longest = config.model.trust_remote_code, max(config.longest().values())
    sample = generation.sample(config.sampler(), longest, trust)
    score = scoring.score(config.scoring, longest, trust)
    run.do(base_model.prepare(config.model), graph.base)
    base_model.check(run, graph.base, config.longest(), {"sft": config.sft, "training": config.training})
    if graph.preferences:
        run.do(demonstrations.prepare(config.preferences, trust), graph.preferences)
    if graph.policy:
        run.do(demonstrations.prepare(config.demonstrations, trust), graph.demonstrations)
        if config.best_of_n.golden == "exact_answer" and config.best_of_n.asked():
            instead = "name a reward model or a module:function as the judge, or set best_of_n.golden=none"
            evaluation.check_answers(run, graph.demonstrations, "best_of_n.golden", "exact_answer", instead)
        run.do(policy_training.train(config.sft, config.tracking, longest, trust), graph.policy.training)
        for samples in graph.samples():
            run.do(sample, *samples)
    if graph.labels:
        run.do(score, graph.labels)
    run.do(reward_training.make_pairs, *graph.pairs())
    run.do(policy_training.train(config.training, config.tracking, longest, trust), *(reward.training for reward in graph.rewards))
    run.do(reward_training.measure, graph.metrics)
    if graph.choice:
        # Where one pool can hold them in turn, all scorers share its start.
        together = config.scoring.backend == "transformers"
        for stages in [tuple(itertools.chain(*graph.scores))] if together else graph.scores:
            run.do(score, *stages)
        run.do(best_of_n.choose, graph.choice)
    return _summary(graph, run)


def _summary(graph: Graph, run: Run) -> dict[str, Any]:
    rewards = run.numbers(graph.metrics)
    warnings = [text for name, numbers in rewards.items() for text in reward_training.doubts(name, numbers)]
    for text in warnings:
        log.warning(text)
    content = {
        "run": run.root.name,
        "rewards": rewards,
        "pairs": {reward.kind: run.numbers(reward.pairs) for reward in graph.rewards},
        "best_of_n": run.numbers(graph.choice) if graph.choice else None,
        "warnings": warnings,
        "stages": run.log,
        "total_seconds": round(sum(stage["seconds"] for stage in run.log), 1),
    }
    write_json(run.root / IrlConfig.file("summary.json"), content)
    return content


def show(content: dict[str, Any], root: Path) -> Shown:
    """The final tables."""
    tables = [Table(f"{content['run']}: reward models on held-out pairs", reward_training.table(content["rewards"]))]
    lines = [f"warning: {text}" for text in content["warnings"]]
    lines += [f"reward models: {root / 'rewards'}/*/seed-*/reward"]
    found = content["best_of_n"]
    if found:
        title = f"best of N on {found['prompts']} held-out prompts"
        tables += [Table(f"{title}: {what}", rows) for what, rows in best_of_n_report.tables(found).items()]
    if found is not None:
        lines.append(f"plot, report and chosen responses: {root / 'best_of_n' / 'results'}")
    return Shown(tables, [*lines, f"summary: {root / IrlConfig.file('summary.json')}"])


if __name__ == "__main__":
    sys.exit(runner.main(IrlConfig, sys.argv[1:], __doc__ or "", plan, learn, show))
