"""What each job reads: its sections, and what must hold between them. Imports nothing heavy."""

from typing import Any, ClassVar

from pydantic import model_validator

from actors.settings import (
    Engine,
    Negatives,
    Objective,
    Pool,
    RewardScoring,
    RewardTraining,
    Sampling,
    Scoring,
    Settings,
    SftTraining,
    Tracking,
    Training,
)
from pipelines.data.generated import GENERATED
from pipelines.judges.settings import Answers, Judge, MtBench, Policies, Prompts, Tournament
from pipelines.lmeval.settings import Tasks
from pipelines.reproduction.settings import ENGINE, PRETRAINING, REWARDS, SCORING, TRAINING, WORKERS, ProblemSets, Scope, Tiny
from pipelines.serving.settings import ServiceConfig
from pipelines.settings import (
    BestOfN,
    Demonstrations,
    DilPreferences,
    Evaluation,
    Iterations,
    LabelledPairs,
    Model,
    RaySettings,
    Responses,
    Rewards,
    RunSettings,
    SelfPlayEvaluation,
)


class JobConfig(Settings):
    """What every job reads."""

    run: RunSettings = RunSettings()
    ray: RaySettings = RaySettings()
    script: ClassVar[str]
    """that reads it"""
    example: ClassVar[str | None] = None
    """a config to begin with, where the defaults alone would be a run that nobody meant"""
    prefix: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _partly(cls, given: Any) -> Any:
        # A section that is given in part keeps this job's defaults for the rest; of an objective its name, as the rest is the preset's.
        if not isinstance(given, dict):
            return given
        own = {name: field.default for name, field in cls.model_fields.items() if isinstance(given.get(name), dict)}
        kept = {name: {"name"} if isinstance(default, Objective) else None for name, default in own.items()}
        return given | {name: own[name].model_dump(exclude_unset=True, include=kept[name]) | given[name] for name in own}

    def demands(self) -> dict[str, tuple[float, float]]:
        """Least (CPUs, GPUs) that must be free at one time, by the setting that asks."""
        found = {}
        for name in type(self).model_fields:
            section = getattr(self, name)
            if isinstance(section, Pool):
                found[f"{name}.min_actors={section.min_actors}"] = (
                    section.min_actors * section.num_cpus,
                    section.min_actors * section.num_gpus,
                )
            elif isinstance(section, Training):
                workers = section.min_workers or section.workers
                found[f"{name}.workers={workers}"] = (workers * section.cpus_per_worker, workers * section.gpus_per_worker)
        return found

    @classmethod
    def file(cls, name: str) -> str:
        """Name of one of the job's files in the run directory: jobs that share one have names of their own."""
        return f"{cls.prefix}{name}"


class ModelJobConfig(JobConfig):
    """What every job reads that starts from a model that is there."""

    model: Model = Model()


class GsilConfig(ModelJobConfig):
    """Everything that `jobs/gsil_iterative.py` reads."""

    script: ClassVar[str] = "jobs/gsil_iterative.py"
    example: ClassVar[str | None] = "jobs/configs/quickstart.yaml"
    demonstrations: Demonstrations = Demonstrations()
    sft: SftTraining = SftTraining()
    iterations: Iterations = Iterations()
    objective: Objective = Objective()
    training: Training = Training()
    negatives: Negatives = Negatives()
    evaluation: SelfPlayEvaluation = SelfPlayEvaluation()
    engine: Engine = Engine()
    scoring: Scoring = Scoring()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _consistent(self) -> "GsilConfig":
        if not self.sft.epochs and not self.iterations.count:
            raise ValueError("sft.epochs=0 and iterations.count=0 train nothing: raise one of the two")
        if self.evaluation.metric == "none" and self.iterations.stop_when_worse:
            raise ValueError("iterations.stop_when_worse=true needs a held-out metric, but evaluation.metric=none: set one of the two")
        require_held_out(self.demonstrations, "every policy answers held-out prompts")
        made = GENERATED.get(self.demonstrations.path)
        if made and self.demonstrations.layout not in ("auto", made.layout):
            raise ValueError(f"demonstrations.layout={self.demonstrations.layout!r} does not fit the generated rows: leave it out")
        return self

    def sampler(self) -> Engine:
        """The engines, in the precision of the last trained policy."""
        return self.engine.as_trained((self.training if self.iterations.count else self.sft).precision)

    def max_model_len(self) -> int:
        """Longest prompt and response that an engine sees, tokens."""
        return max(self._sampled().values())

    def _sampled(self) -> dict[str, int]:
        return longest_sampled(self.demonstrations, negatives=self.negatives, evaluation=self.evaluation)

    def longest(self) -> dict[str, int]:
        """Longest sequences that the model meets, tokens, by the settings that ask for them."""
        return self._sampled() | longest_given(self.demonstrations, self.objective)


class DilConfig(ModelJobConfig):
    """Everything that `jobs/dil.py` reads."""

    script: ClassVar[str] = "jobs/dil.py"
    run: RunSettings = RunSettings(name="dil")
    demonstrations: DilPreferences = DilPreferences()
    sft: SftTraining = SftTraining()
    objective: Objective = Objective(name="dil_lsif")
    training: Training = Training()
    evaluation: Evaluation = Evaluation(metric="none")
    engine: Engine = Engine()
    scoring: Scoring = Scoring()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _needs_pairs(self) -> "DilConfig":
        if self.demonstrations.sft_first and not self.sft.epochs:
            raise ValueError("demonstrations.sft_first=true and sft.epochs=0 contradict each other: change one of the two")
        if self.demonstrations.path in ("", *GENERATED):
            raise ValueError("demonstrations.path must name preference pairs: a file, directory, glob, URI or hub id")
        if self.evaluation.metric != "none":
            require_held_out(self.demonstrations, "evaluation.metric asks for held-out prompts")
        return self

    def sampler(self) -> Engine:
        """The engines, in the precision of the trained policy."""
        return self.engine.as_trained(self.training.precision)

    def longest(self) -> dict[str, int]:
        """Longest sequences that the model meets, tokens, by the settings that ask for them."""
        answered = longest_sampled(self.demonstrations, evaluation=self.evaluation) if self.evaluation.metric != "none" else {}
        return answered | longest_given(self.demonstrations, self.objective)


class IrlConfig(ModelJobConfig):
    """Everything that `jobs/irl_reward.py` reads."""

    script: ClassVar[str] = "jobs/irl_reward.py"
    example: ClassVar[str | None] = "jobs/configs/irl_arithmetic.yaml"
    prefix: ClassVar[str] = "reward-"
    demonstrations: Demonstrations = Demonstrations()
    preferences: LabelledPairs = LabelledPairs()
    sft: SftTraining = SftTraining()
    responses: Responses = Responses()
    rewards: Rewards = Rewards()
    training: RewardTraining = RewardTraining()
    best_of_n: BestOfN = BestOfN()
    engine: Engine = Engine()
    scoring: RewardScoring = RewardScoring()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _consistent(self) -> "IrlConfig":
        if "bt" in self.rewards.kinds and not self.given_preferences():
            mend = "or name preferences.path"
            if self.best_of_n.golden == "none":
                raise ValueError(f"preference pairs are made by the golden judge, but best_of_n.golden=none: name one, {mend}")
            if self.responses.samples < 2:
                raise ValueError(f"preference pairs are made of several samples of a prompt, but responses.samples=1: raise it, {mend}")
        if self.preferences.path != "golden" and "bt" not in self.rewards.kinds:
            raise ValueError(f"preferences.path={self.preferences.path!r} is read by nobody: add bt to rewards.kinds")
        if self.needs_policy() and not self.sft.epochs:
            raise ValueError("sft.epochs=0: reward models learn what SFT improved, so there has to be some")
        members = [f"{kind}-{seed}" for kind in self.rewards.kinds for seed in range(self.rewards.seeds)] if self.rewards.seeds > 1 else []
        choosers = [*self.rewards.kinds, *members, *self.best_of_n.scorers, *(["ensemble"] if self.rewards.ensemble else [])]
        if self.best_of_n.choose_by not in (None, *choosers):
            raise ValueError(f"best_of_n.choose_by={self.best_of_n.choose_by!r} chooses nothing: there are {', '.join(choosers)}")
        if self.preferences.path in GENERATED:
            raise ValueError(f"preferences.path={self.preferences.path!r} is generated, and no preference pairs: name a file or a hub id")
        if "held_out" in self.best_of_n.asked():
            require_held_out(self.demonstrations, "Best-of-N is measured on held-out prompts")
        return self

    def sampler(self) -> Engine:
        """The engines, in the precision of the SFT policy."""
        return self.engine.as_trained(self.sft.precision)

    def given_preferences(self) -> bool:
        """Whether the preference pairs of "bt" were given, not made."""
        return "bt" in self.rewards.kinds and self.preferences.path != "golden"

    def needs_policy(self) -> bool:
        """Whether the SFT policy has anything to do."""
        alone = self.rewards.kinds == ["bt"] and self.given_preferences() and self.rewards.start_from == "base"
        return not alone or bool(self.best_of_n.asked())

    def chooser(self) -> str:
        """Whose choice is written out."""
        return self.best_of_n.choose_by or ("ensemble" if self.rewards.ensemble else self.rewards.kinds[0])

    def longest(self) -> dict[str, int]:
        """Longest sequences that the model meets, tokens, by the settings that ask for them."""
        preferences = {"preferences.max_tokens": self.preferences.max_tokens} if self.given_preferences() else {}
        if not self.needs_policy():
            return preferences
        sampled = longest_sampled(self.demonstrations, responses=self.responses, best_of_n=self.best_of_n)
        return sampled | {"demonstrations.max_tokens": self.demonstrations.max_tokens} | preferences


class EvaluateConfig(ModelJobConfig):
    """Everything that `jobs/evaluate.py` reads."""

    script: ClassVar[str] = "jobs/evaluate.py"
    prefix: ClassVar[str] = "evaluation-"
    run: RunSettings = RunSettings(name="evaluation")
    policies: Policies = Policies()
    prompts: Prompts = Prompts()
    answers: Answers = Answers()
    tasks: Tasks = Tasks()
    judge: Judge = Judge()
    tournament: Tournament = Tournament()
    mt_bench: MtBench = MtBench()
    engine: Engine = Engine()
    scoring: RewardScoring = RewardScoring()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _consistent(self) -> "EvaluateConfig":
        if not (self.wants_prompts() or self.tasks.names or self.mt_bench.path):
            raise ValueError(
                "nothing is asked for: name answers.measures, answers.reference, tasks.names, tournament.contestants or mt_bench.path"
            )
        if (self.tournament.contestants or self.mt_bench.path) and not self.judge.given():
            raise ValueError("tournament.contestants and mt_bench.path need a judge: name judge.path or judge.url")
        if self.tournament.contestants and self.prompts.path == "none":
            raise ValueError("tournament.contestants need prompts, but prompts.path=none: change one of the two")
        return self

    def wants_prompts(self) -> bool:
        """Whether anything is made of answers to the prompts."""
        return bool(self.answers.measures or self.answers.reference or self.tournament.contestants)

    def precision(self) -> str:
        """Precision of log-probs and rewards."""
        return "bfloat16" if self.engine.dtype == "bfloat16" else "float32"

    def max_model_len(self) -> int:
        """Longest prompt and answer, tokens."""
        return self.prompts.max_prompt_tokens + self.answers.max_new_tokens

    def longest(self) -> dict[str, int]:
        """Longest sequences that the models meet, tokens, by the settings that ask for them."""
        return {"prompts.max_prompt_tokens + answers.max_new_tokens": self.max_model_len()} if self.wants_prompts() else {}


class ReproduceConfig(JobConfig):
    """Everything that `jobs/reproduce.py` reads."""

    script: ClassVar[str] = "jobs/reproduce.py"

    run: RunSettings = RunSettings(name="reproduce")
    scope: Scope = Scope()
    model: Tiny = Tiny()
    problems: ProblemSets = ProblemSets()
    pretraining: Training = PRETRAINING
    training: Training = TRAINING
    rewards: RewardTraining = REWARDS
    engine: Engine = ENGINE
    scoring: RewardScoring = SCORING
    workers: Pool = WORKERS


class ServeConfig(ServiceConfig):
    """Everything that `jobs/serve_bon.py` reads."""

    ray: RaySettings = RaySettings()


def require_held_out(data: Demonstrations, why: str) -> None:
    """Raises ValueError where nothing is held out, and says who needs it."""
    if not data.holds_out():
        raise ValueError(
            f"demonstrations.held_out_fraction=0 holds nothing out, but {why}: raise it, or name a held_out_path or a held_out_split"
        )


def longest_sampled(data: Demonstrations, **sections: Sampling | Evaluation | BestOfN) -> dict[str, int]:
    """Longest prompt with a response that one of the sections asks for, by the settings that say so."""
    longer = max(sections, key=lambda name: sections[name].max_new_tokens)
    name = f"{data.section}.max_prompt_tokens + {longer}.max_new_tokens"
    return {name: data.max_prompt_tokens + sections[longer].max_new_tokens}


def longest_given(data: Demonstrations, objective: Objective) -> dict[str, int]:
    """Longest sequence of the data itself; KTO also puts a response behind another prompt."""
    if objective.function == "kto":
        return {"demonstrations.max_prompt_tokens + demonstrations.max_tokens": data.max_prompt_tokens + data.max_tokens}
    return {"demonstrations.max_tokens": data.max_tokens}
