"""Settings of the reproduction: what is run, the tiny model, its problems, and the defaults of its training."""

from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field

from actors.settings import Engine, Pool, RewardScoring, RewardTraining, Settings, Training

TABLES = ("gsil", "gsil_grid", "dil", "afd", "afd_rewards", "beyond")

if TYPE_CHECKING:
    TableName: TypeAlias = str
else:
    TableName = Literal[TABLES]


class Scope(Settings):
    """What is run."""

    seeds: int = Field(5, ge=1)
    """independent repetitions: weights, corpus, demonstrations, test problems and order of rows are all drawn anew"""
    tables: list[TableName] = Field(list(TABLES), min_length=1)
    """gsil: GSIL Table 2 and Fig. 2; gsil_grid: its Fig. 7; dil: DIL Tables 2 and 4, Fig. 2; afd: AfD Fig. 3; afd_rewards: its Fig. 4 and
    Table 2; beyond: variants of GSIL that the papers leave open"""
    arms: list[str] | None = None
    """of the tables gsil and dil, by name; all by default"""
    trials: int = Field(8, ge=1)
    """settings that every arm tries on the validation problems of seed 0; the best is then used for all seeds"""
    iterations: int = Field(3, ge=1)
    """of the arms of gsil; the others train once"""


class Tiny(Settings):
    """The model that is trained from scratch: a Llama with heads of 32."""

    hidden_size: int = Field(128, ge=32, multiple_of=32)
    """width; the MLP is four times as wide"""
    layers: int = Field(3, ge=1)
    """layers"""
    context: int = Field(160, ge=32)
    """longest prompt and response, tokens"""


class ProblemSets(Settings):
    """Generated problems with checkable answers; every seed has its own."""

    corpus: int = Field(9000, ge=3)
    """rows of the pre-training corpus, in all styles"""
    careless: float = Field(0.5, ge=0, le=1)
    """share of wrong solutions in it"""
    demonstrations: int = Field(300, ge=3)
    """right solutions, in one style"""
    prompts: int = Field(300, ge=3)
    """further prompts, for preference pairs that the checker makes of samples"""
    validation: int = Field(300, ge=3)
    """problems on which settings are chosen"""
    test: int = Field(450, ge=3)
    """problems that only chosen settings meet, once"""


class Problems(Settings):
    """Generated problems of one split."""

    count: int = Field(ge=1)
    """how many"""
    split: Literal["train", "validation", "test"] = "train"
    """from which part of all problems"""
    lengths: list[int] = Field([2, 3], min_length=1)
    """digits, operations and clauses of a problem, in turn"""
    careless: float = Field(0.0, ge=0, le=1)
    """share of solutions by the careless writer"""
    styles: list[Literal["plain", "wordy", "verbose"]] = Field(["plain"], min_length=1)
    """how the working is written, in equal parts"""
    max_prompt_tokens: int = 48
    """a longer prompt is an error"""
    max_tokens: int = 160
    """a longer prompt with its response is an error"""


# One thread and one worker: a model of a million weights gains nothing from more.
_SMALL = {"micro_batch_tokens": 4096, "zero_stage": 0, "checkpoint_every": 0, "batch_size": 16, "gradient_checkpointing": False}
PRETRAINING = Training(epochs=3, learning_rate=2e-3, **(_SMALL | {"checkpoint_every": 500}))
TRAINING = Training(epochs=2, learning_rate=3e-4, **_SMALL)
REWARDS = RewardTraining(epochs=2, learning_rate=3e-4, lora_r=0, **_SMALL)
ENGINE = Engine(backend="transformers", dtype="float32", max_actors=2, min_actors=2)
SCORING = RewardScoring(backend="transformers", max_actors=2, min_actors=2)
WORKERS = Pool(max_actors=2, min_actors=2)
