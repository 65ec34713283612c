"""The job graph of a reproduction: what all arms have in common once, then a branch for each arm and seed.

seed-0/pretraining -> seed-0/sft -> seed-0/sft/negatives -> seed-0/sft/pairs
                                          '-> search/ARM/trial-K/{training,samples,evaluation} -> search/ARM/choice
                   (all seeds)            '-> seed-0/ARM/iteration-1/training -> .../iteration-2/... -> test/{samples,evaluation}
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from actors.settings import Objective, Sampling, Training
from pipelines import evaluation, generation, policy_training, reference
from pipelines.reproduction import data, search, tiny
from pipelines.reproduction.arms import SFT_SETTINGS, Arm, Setting
from pipelines.reproduction.order import Step
from pipelines.reproduction.settings import Problems
from pipelines.reproduction.tables import VERSION
from pipelines.run.artifacts import Stage
from pipelines.settings import Evaluation

NEW_TOKENS = 72
"""Length limit of a response, tokens; demonstrations in the longest style have 69 at most."""
METRIC = Evaluation(metric="exact_text", max_new_tokens=NEW_TOKENS)
SAMPLED = Sampling(max_new_tokens=NEW_TOKENS)
SEVERAL = Sampling(max_new_tokens=NEW_TOKENS, samples=4, seed=1)
STYLES: Any = ["plain", "wordy", "verbose"]


@dataclass(frozen=True)
class Seed:
    """What all arms of a seed have in common."""

    number: int
    demonstrations: Stage
    """train, and held_out: the validation problems"""
    test: Stage
    prompts: Stage
    pretrained: Stage
    sft: Stage


@dataclass
class Builder:
    """Plans stages; every one is kept once.

    Args:
        config: of the job.
    """

    config: Any
    steps: dict[str, Step] = field(default_factory=dict)

    def add(self, kind: str, stage: Stage) -> Stage:
        """Keeps a stage."""
        known = self.steps.setdefault(stage.name, Step(kind, stage)).stage
        assert known.fingerprint == stage.fingerprint, f"two stages are called {stage.name}"
        return known

    @property
    def base(self) -> Stage:
        """Tokenizer and architecture."""
        return self.add("model", tiny.plan(self.config.model))

    def problems(self, name: str, seed: int, drawn: str | None = None, **splits: Problems) -> Stage:
        """Generated rows; stages of the same `drawn`, by default their name, have the same questions."""
        return self.add("problems", data.plan(name, self.base, seed, splits, drawn or name))

    def table(self, name: str, inputs: dict[str, Stage], **settings: Any) -> Stage:
        """The stage of a table."""
        return self.add("tables", Stage(f"tables/{name}", settings | {"table": name}, inputs, "the driver", VERSION))

    def tested(self, inputs: dict[str, Stage], seed: Seed, arm: str, policy: Stage, what: str = "1") -> None:
        """Evaluates a policy on the test problems, greedily, for a table; the samples stand beside its training."""
        inputs[f"{arm}:{seed.number}:{what}"] = self.evaluated(f"{policy.name.removesuffix('/training')}/test", policy, seed.test)

    def training(
        self, name: str, start: Stage, rows: Stage, training: Training, objective: Objective, choice: Stage | None = None, seed: int = 0
    ) -> Stage:
        """A training; with `choice` its learning rate, beta and gamma are what that search chose."""
        own = training.model_copy(update={"seed": seed})
        stage = policy_training.plan(name, start, self.base, rows, own, objective)
        return self.add("training", replace(stage, inputs={**stage.inputs, search.CHOSEN: choice}) if choice else stage)

    def samples(self, name: str, policy: Stage, rows: Stage, sampling: Sampling, *splits: str, iteration: int = 0) -> Stage:
        """Responses of a policy to the prompts of some splits, by default those for training."""
        prompts: dict[str, int | None] = dict.fromkeys(splits or ("train",))
        return self.add("samples", generation.plan(name, policy, self.base, rows, sampling, self.config.engine, iteration, prompts))

    def evaluated(self, name: str, policy: Stage, rows: Stage, sampling: Sampling | None = None) -> Stage:
        """Right answers of a policy to held-out problems, greedy by default."""
        drawn = self.samples(f"{name}/samples", policy, rows, sampling or METRIC.sampling(), "held_out")
        return self.add("evaluation", evaluation.plan(f"{name}/evaluation", drawn, rows, METRIC))

    def pairs(self, name: str, rows: Stage, negatives: Sequence[Stage], policy: Stage, objective: Objective) -> Stage:
        """Pairs with a reference's log-probs."""
        config = self.config
        stage = reference.plan(name, rows, tuple(negatives), policy, "keep", config.training, objective, config.scoring)
        return self.add("pairs", stage)

    def seed(self, number: int) -> Seed:
        """Everything up to the SFT policy."""
        sets, name = self.config.problems, f"seed-{number}"
        blank = self.add("blank", tiny.plan_blank(f"{name}/blank", self.base, number))
        corpus = Problems(count=sets.corpus, careless=sets.careless, styles=STYLES)
        rows = self.problems(f"{name}/data/corpus", number, train=corpus)
        demonstrations = self.demonstrations(number)
        test = self.problems(f"{name}/data/test", number, held_out=Problems(count=sets.test, split="test"))
        prompts = self.problems(f"{name}/data/prompts", number, train=Problems(count=sets.prompts))
        pretrained = self.training(f"{name}/pretraining/training", blank, rows, self.config.pretraining, Objective(name="sft"), seed=number)
        choice = self.sft_choice(demonstrations, pretrained) if number == 0 else self.steps["search/sft/choice"].stage
        sft = self.training(f"{name}/sft/training", pretrained, demonstrations, self.sft_training(), Objective(name="sft"), choice, number)
        return Seed(number, demonstrations, test, prompts, pretrained, sft)

    def demonstrations(self, number: int, name: str = "demonstrations", **given: Any) -> Stage:
        """Demonstrations of a seed, and its validation problems: always the same questions."""
        sets = self.config.problems
        train = Problems(count=sets.demonstrations, **given)
        held_out = Problems(count=sets.validation, split="validation")
        stem = f"seed-{number}/data"
        return self.problems(f"{stem}/{name}", number, f"{stem}/demonstrations", train=train, held_out=held_out)

    def sft_training(self) -> Training:
        """SFT takes twice as many passes as an iteration, as SFT in the papers does."""
        return self.config.training.model_copy(update={"epochs": 2 * self.config.training.epochs})

    def sft_choice(self, demonstrations: Stage, pretrained: Stage) -> Stage:
        """The search for the SFT policy's learning rate."""
        arm = Arm("sft", "sft", "demonstrations", SFT_SETTINGS)
        return self.search(arm, pretrained, demonstrations, demonstrations, self.sft_training())

    def search(self, arm: Arm, start: Stage, rows: Stage, validation: Stage, training: Training) -> Stage:
        """All trials of an arm, and the choice among them."""
        tried = arm.settings[: self.config.scope.trials]
        evaluations = []
        for number, setting in enumerate(tried):
            name = f"search/{arm.name}/trial-{number}"
            own = training.model_copy(update={"learning_rate": setting.learning_rate})
            trained = self.training(f"{name}/training", start, rows, own, setting.objective(arm.preset))
            evaluations.append(self.evaluated(name, trained, validation))
        return self.add("choice", search.plan(f"search/{arm.name}/choice", tried, evaluations))

    def tried(self, arm: Arm, start: Stage, rows: Stage, validation: Stage, training: Training | None = None) -> Stage:
        """The choice of an arm, planned once for all seeds."""
        known = self.steps.get(f"search/{arm.name}/choice")
        return known.stage if known else self.search(arm, start, rows, validation, training or self.config.training)

    def negatives(self, name: str, policy: Stage, rows: Stage, iteration: int) -> Stage:
        """A policy's own samples; in a first iteration also for held-out pairs, whose log ratios are no memory of training."""
        splits = ("train", "held_out") if iteration == 1 else ("train",)
        return self.samples(f"{name}/negatives", policy, rows, SAMPLED, *splits, iteration=iteration)

    def rows_of(self, arm: Arm, seed: Seed, policy: Stage, name: str, iteration: int = 1) -> Stage:
        """What an arm learns from in an iteration that starts from `policy`; those of the SFT policy are shared by all arms."""
        objective = Setting(1e-4).objective(arm.preset)
        kto = "-kto" if objective.function == "kto" else ""
        if arm.data == "demonstrations":
            return seed.demonstrations
        if arm.data == "self_play":
            negatives = self.negatives(name, policy, seed.demonstrations, iteration)
            return self.pairs(f"{name}/pairs{kto}", seed.demonstrations, [negatives], policy, objective)
        told_apart = self.preferences(name, policy, seed.prompts, SEVERAL, iteration)
        return self.pairs(f"{name}/preference-pairs{kto}", told_apart, (), policy, objective)

    def preferences(self, name: str, policy: Stage, prompts: Stage, sampling: Sampling, iteration: int = 0) -> Stage:
        """Right and wrong samples of a policy to the same prompts."""
        drawn = self.samples(f"{name}/candidates", policy, prompts, sampling, iteration=iteration)
        return self.add("preferences", data.plan_preferences(f"{name}/preferences", drawn, prompts))

    def iterated(self, arm: Arm, seed: Seed, iterations: int) -> list[Stage]:
        """The policies of an arm, one an iteration; settings are those chosen on seed 0."""
        policies, last, name = [], seed.sft, f"seed-{seed.number}/sft"
        for t in range(1, iterations + 1):
            rows = self.rows_of(arm, seed, last, name, t)
            choice = self.tried(arm, last, rows, seed.demonstrations)
            name = f"seed-{seed.number}/{arm.name}/iteration-{t}"
            preset = arm.settings[0].objective(arm.preset)
            last = self.training(f"{name}/training", last, rows, self.config.training, preset, choice, 100 * seed.number + t)
            policies.append(last)
        return policies
