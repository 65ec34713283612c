"""Evaluate policies: tasks of lm-eval, measures of their answers, tournaments and MT-Bench before a judge.

    python jobs/evaluate.py --run.name quickstart [--config my.yaml] [--tasks.names '[gsm8k]'] [--judge.path MODEL | --judge.url URL]
        [--section.key value ...] [--dry-run]

    each policy ----> answers to the prompts ----> measures: exact answer, pattern, golden reward, lengths, variety, KL divergence
                 |                           '---> tournament: everybody against everybody, both orders ----> judge
                 |---> MT-Bench, two turns ---------------------------------------------------------------> judge
                 '---> tasks: gsm8k, arc_challenge, ...      (lm-eval, in parallel over policies and tasks)

Policies are those of a run, and any others by path. What is not asked for is left out; the same command continues where it was stopped.
--allow-code-execution lets humaneval and mbpp run the programs that policies write.
"""

import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs import runner
from jobs.schemas import EvaluateConfig
from pipelines import base_model, demonstrations, generation, judging, measures, mt_bench, scoring, tables, tasks, tournament
from pipelines.report import scoreboard
from pipelines.run import policies
from pipelines.run.artifacts import Run, Stage, StageError, write_json
from pipelines.settings import Model

log = logging.getLogger("gsil")
CODE = ("--tasks.allow_code_execution", "true")


@dataclass(frozen=True)
class Evaluated:
    """A policy, and what is made of it."""

    name: str
    source: Model
    model: Stage
    prompts: Stage | None = None
    answers: Stage | None = None
    scores: dict[str, Stage] = field(default_factory=dict)
    draws: Stage | None = None
    """free samples, for the KL divergence"""
    divergence: tuple[Stage, ...] = ()
    """log-probs of the draws under the policy and the reference"""
    measures: Stage | None = None
    tasks: dict[str, Stage] = field(default_factory=dict)
    turns: tuple[Stage, ...] = ()
    """of MT-Bench: prompts, answers, prompts, answers"""

    def stages(self) -> list[Stage]:
        """In the order in which they run."""
        measured = [self.prompts, self.answers, self.draws, *self.scores.values(), *self.divergence, self.measures]
        return [self.model, *(stage for stage in (*measured, *self.turns, *self.tasks.values()) if stage)]


@dataclass(frozen=True)
class Graph:
    """All stages of the job."""

    policies: tuple[Evaluated, ...]
    judge: Stage | None = None
    """the judge's weights, where it judges here"""
    tournament: tuple[Stage, ...] = ()
    """questions, answers, games"""
    mt_bench: tuple[Stage, ...] = ()
    """questions, answers, grades"""

    def stages(self) -> list[Stage]:
        """In the order in which they run."""
        own = [stage for policy in self.policies for stage in policy.stages()]
        return [*own, *([self.judge] if self.judge else []), *self.tournament, *self.mt_bench]


def plan(config: EvaluateConfig) -> Graph:
    """The job graph with all fingerprints; nothing runs.

    Raises:
        StageError: there is no policy, or something that was asked for is not there.
    """
    root = _root(config)
    found = policies.of_run(root) if config.policies.run or any((root / name).is_file() for name in policies.CONFIGS) else {}
    # A judge, tasks and prompts run code of a model only where it was allowed.
    trust = config.model.trust_remote_code
    if twice := sorted(found.keys() & config.policies.paths.keys()):
        raise StageError(f"policies.paths: {twice[0]!r} is already a policy of {root}: give this one another name")
    named = found | {name: Model(path=path, trust_remote_code=trust) for name, path in config.policies.paths.items()}
    for name in (*config.policies.only, *([config.answers.reference] if config.answers.reference else [])):
        if name not in named:
            begun = (root / name / "training").is_dir()
            left = " (its training is not finished, or damaged: the job of the run goes on with it)" if begun else ""
            raise StageError(f"there is no policy {name!r}{left}; there are {', '.join(named) or 'none'}")
    wanted = {*config.policies.only, config.answers.reference} if config.policies.only else named
    chosen = {name: model for name, model in named.items() if name in wanted} or {"model": config.model}
    config = _resolved(config)
    planned = [_evaluated(config, name, model) for name, model in chosen.items()]
    reference = next((policy for policy in planned if policy.name == config.answers.reference), None)
    everybody = tuple(_measured(config, policy, reference) if policy.answers else policy for policy in planned)
    return _judged(config, everybody)


def _asks(config: EvaluateConfig) -> bool:
    """Whether there are prompts."""
    return config.wants_prompts() and config.prompts.path != "none"


def _resolved(config: EvaluateConfig) -> EvaluateConfig:
    """With the prompts named: where nobody did, the held-out demonstrations of the run, each as long as the run allows."""
    if config.prompts.path or not _asks(config):
        return config
    root = _root(config)
    found = policies.demonstrations(root)
    if found is None:
        what = "has no held-out demonstrations" if root.exists() else "is no run: there is no such directory"
        raise StageError(f"prompts.path is not given, and {root} {what}: name a file of prompts, or another run")
    lengths = {name: max(getattr(config.prompts, name), found.get(name, 0)) for name in ("max_prompt_tokens", "max_tokens")}
    return config.model_copy(update={"prompts": config.prompts.model_copy(update=found | lengths)})


def _evaluated(config: EvaluateConfig, name: str, source: Model) -> Evaluated:
    folder = f"evaluation/policies/{name}"
    model = base_model.plan(source, f"{folder}/model")
    policy = Evaluated(name, source, model)
    if _asks(config):
        prompts = demonstrations.plan(config.prompts, model, f"{folder}/prompts")
        drawn = config.answers.drawn()
        answers = generation.plan(f"{folder}/answers", model, model, prompts, drawn, config.engine, 0, {"train": None})
        policy = replace(policy, prompts=prompts, answers=answers)
    if config.mt_bench.path:
        turns: list[Stage] = []
        for turn in mt_bench.TURNS:
            asked = mt_bench.plan_turn(f"{folder}/mt_bench/turn-{turn}", turn, model, config.mt_bench, turns[-1] if turns else None)
            sampling = config.mt_bench.sampling()
            name_of = f"{folder}/mt_bench/answers-{turn}"
            turns += [asked, generation.plan(name_of, model, model, asked, sampling, config.engine, 0, {"train": None})]
        policy = replace(policy, turns=tuple(turns))
    done = {
        task: tasks.plan(f"{folder}/tasks/{task}", task, model, model, config.tasks, config.engine) for task in tasks.names(config.tasks)
    }
    return replace(policy, tasks=done)


def _measured(config: EvaluateConfig, policy: Evaluated, reference: Evaluated | None) -> Evaluated:
    assert policy.prompts and policy.answers
    folder, precision = f"evaluation/policies/{policy.name}", config.precision()
    scores = {}
    for number, measure in enumerate(config.answers.measures, start=1):
        name = f"{folder}/score-{number}"
        scores[measure] = scoring.plan(name, policy.answers, policy.prompts, measure, precision, config.scoring, ("train",))
    if not reference or reference is policy:
        summed = measures.plan(f"{folder}/measures", policy.answers, scores)
        return replace(policy, scores=scores, measures=summed)
    free = config.answers.free()
    draws = generation.plan(f"{folder}/draws", policy.model, policy.model, policy.prompts, free, config.engine, 0, {"train": None})
    own, other = (
        measures.plan_log_probs(f"{folder}/log-probs-{role}", draws, model, model, precision, config.scoring)
        for role, model in (("own", policy.model), ("reference", reference.model))
    )
    summed = measures.plan(f"{folder}/measures", policy.answers, scores, own, other)
    return replace(policy, scores=scores, draws=draws, divergence=(own, other), measures=summed)


def _judge(config: EvaluateConfig) -> Model:
    """The model that judges here."""
    return Model(path=config.judge.path or "", trust_remote_code=config.model.trust_remote_code)


def _judged(config: EvaluateConfig, everybody: tuple[Evaluated, ...]) -> Graph:
    judge = base_model.plan(_judge(config), "evaluation/judge/model") if config.judge.path else None
    graph = Graph(everybody, judge)
    if config.tournament.contestants:
        samples = {policy.name: policy.answers for policy in everybody if policy.answers}
        prompts = next((policy.prompts for policy in everybody if policy.prompts), None)
        if prompts is None:
            raise StageError("a tournament needs prompts: name prompts.path, or a run with held-out demonstrations")
        asked = tournament.plan_questions(prompts, samples, config.tournament, config.judge)
        answers = judging.plan("evaluation/tournament/answers", asked, config.judge, judge)
        graph = replace(graph, tournament=(asked, answers, tournament.plan_games(asked, answers, config.tournament)))
    if config.mt_bench.path:
        turns = {policy.name: (policy.turns[1], policy.turns[3]) for policy in everybody}
        asked = mt_bench.plan_questions(turns, config.mt_bench, config.judge)
        answers = judging.plan("evaluation/mt_bench/answers", asked, config.judge, judge)
        graph = replace(graph, mt_bench=(asked, answers, mt_bench.plan_grades(answers)))
    return graph


def evaluate(config: EvaluateConfig, graph: Graph, run: Run) -> dict[str, Any]:
    """Runs the job.

    Returns:
        what went into evaluation-summary.json.
    """
    config, trust = _resolved(config), config.model.trust_remote_code
    for policy in graph.policies:
        run.do(base_model.prepare(policy.source), policy.model)
        if policy.answers:
            base_model.check(run, policy.model, config.longest(), {})
        _answer(config, policy, run)
    for measure in config.answers.measures:
        scored = [policy.scores[measure] for policy in graph.policies if policy.answers]
        run.do(scoring.score(config.scoring, config.max_model_len(), trust), *scored)
    for policy in graph.policies:
        for stage in policy.divergence:
            run.do(measures.log_probs(config.scoring, config.max_model_len(), trust), stage)
        if policy.measures:
            run.do(measures.measure, policy.measures)
    run.do(tasks.evaluate(config.tasks, config.engine, trust), *(stage for policy in graph.policies for stage in policy.tasks.values()))
    if graph.judge:
        run.do(base_model.prepare(_judge(config)), graph.judge)
    ask = judging.ask(config.judge, trust)
    if graph.tournament:
        asked, answers, games = graph.tournament
        run.do(tournament.write_questions(config.tournament), asked)
        run.do(ask, answers)
        run.do(tournament.judge_games(config.tournament, config.judge), games)
    if graph.mt_bench:
        asked, answers, grades = graph.mt_bench
        run.do(mt_bench.write_questions(config.mt_bench, [policy.name for policy in graph.policies]), asked)
        run.do(ask, answers)
        run.do(mt_bench.read_grades(config.mt_bench, config.judge), grades)
    return _summary(graph, run)


def _answer(config: EvaluateConfig, policy: Evaluated, run: Run) -> None:
    """All that needs the policy's engine: one start of it, and one for the second turn of MT-Bench."""
    trust = config.model.trust_remote_code
    sampled, longest = [stage for stage in (policy.answers, policy.draws) if stage], config.max_model_len()
    if policy.prompts:
        run.do(demonstrations.prepare(config.prompts, trust), policy.prompts)
    for asked, answers in zip(policy.turns[::2], policy.turns[1::2], strict=True):
        run.do(mt_bench.write_turn(config.mt_bench, trust), asked)
        sampled, longest = [*sampled, answers], max(longest, run.numbers(asked)["longest"] + config.mt_bench.max_new_tokens)
        run.do(generation.sample(config.engine, longest, trust), *sampled)
        sampled = []
    if sampled:
        run.do(generation.sample(config.engine, longest, trust), *sampled)


def _root(config: EvaluateConfig) -> Path:
    """Directory of the run whose policies and held-out demonstrations are taken."""
    return Path(config.policies.run).expanduser().resolve() if config.policies.run else config.run.directory()


def _summary(graph: Graph, run: Run) -> dict[str, Any]:
    played = run.numbers(graph.tournament[-1]) if graph.tournament else None
    judged = {stage.name: run.numbers(stage) for stage in (*graph.tournament[1:2], *graph.mt_bench[1:2])}
    graded = run.numbers(graph.mt_bench[-1]) if graph.mt_bench else None
    measured = {policy.name: run.numbers(policy.measures) for policy in graph.policies if policy.measures}
    benchmarks = {policy.name: {task: run.numbers(stage) for task, stage in policy.tasks.items()} for policy in graph.policies}
    warnings = measures.doubts(measured) + tasks.doubts(benchmarks)
    warnings += [*(tournament.doubts(played) if played else []), *(mt_bench.doubts(graded) if graded else [])]
    for text in warnings:
        log.warning(text)
    content = {
        "run": run.root.name,
        "measures": measured,
        "tasks": benchmarks,
        "tournament": played,
        "mt_bench": graded,
        "judge": judged,
        "warnings": warnings,
        "stages": run.log,
        "total_seconds": round(sum(stage["seconds"] for stage in run.log), 1),
    }
    write_json(run.root / EvaluateConfig.file("summary.json"), content)
    return content


def show(content: dict[str, Any], root: Path) -> tables.Shown:
    """The final tables."""
    lines = [f"warning: {text}" for text in content["warnings"]]
    shown = [tables.Table(title, rows) for title, rows in scoreboard.tables(content).items()]
    return tables.Shown(shown, [*lines, f"summary: {root / EvaluateConfig.file('summary.json')}"])


if __name__ == "__main__":
    # A person should see in the command itself that programs of a model will run: what a file says does not count.
    asked = [word for given in sys.argv[1:] for word in (CODE if given == "--allow-code-execution" else (given,))]
    if not any(word.startswith(CODE[0]) for word in asked):
        asked += [CODE[0], "false"]
    sys.exit(runner.main(EvaluateConfig, asked, __doc__ or "", plan, evaluate, show))
