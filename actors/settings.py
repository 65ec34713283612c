"""Settings that a process with a model reads: sampling, engine, scorer, objective, training.

Only pydantic is imported, so that a command line can be parsed before torch, vLLM or Ray load.

A field marked with `placement(...)` says where and how fast work runs, not what comes out of it. It stays out of a stage's
fingerprint: the same run continues on a larger machine.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


def placement(default: Any, **constraints: Any) -> Any:
    """A field that does not change a stage's result beyond rounding."""
    return Field(default, json_schema_extra={"placement": True}, **constraints)


class Settings(BaseModel):
    """Frozen, and strict about names. A field's docstring is its line in `--help`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    def identity(self) -> dict[str, Any]:
        """The settings that determine a result, for a fingerprint."""
        fields = type(self).model_fields.items()
        placed = {name for name, field in fields if (field.json_schema_extra or {}).get("placement")}  # type: ignore[union-attr]
        return self.model_dump(mode="json", exclude=placed)


class Sampling(Settings):
    """How responses are drawn from a policy."""

    greedy: bool = False
    """take the most likely token always (the paper's negatives); temperature and top_p are then unused"""
    temperature: float = Field(1.0, gt=0)
    """softmax temperature"""
    top_p: float = Field(1.0, gt=0, le=1)
    """nucleus: sample from the smallest set of tokens with this probability"""
    max_new_tokens: int = Field(256, ge=1)
    """a response that reaches this length is cut, has no EOS and finish_reason "length" """
    samples: int = Field(1, ge=1)
    """responses a prompt"""
    seed: int = 0
    """seed of the sampler"""

    @model_validator(mode="after")
    def _one_greedy_sample(self) -> "Sampling":
        if self.greedy and self.samples > 1:
            raise ValueError(f"greedy sampling gives the same response every time: samples={self.samples} must be 1")
        return self


class Negatives(Sampling):
    """Self-play: samples of the current policy, to be told from the demonstrations."""

    truncated: Literal["keep", "drop"] = "keep"
    """a generated response that was cut at max_new_tokens: train on it, or drop the pair"""


class Pool(Settings):
    """A pool of identical actors that Ray Data scales between two sizes."""

    min_actors: int = placement(1, ge=1)
    """actors kept while the stage runs"""
    max_actors: int = placement(1, ge=1)
    """actors at most"""
    num_cpus: float = placement(1, ge=0)
    """CPUs an actor asks Ray for"""
    num_gpus: float = placement(0, ge=0)
    """GPUs an actor asks Ray for"""

    @model_validator(mode="after")
    def _range(self) -> "Pool":
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors={self.min_actors} is more than max_actors={self.max_actors}")
        return self

    def demand(self) -> str:
        """For a person: what the pool asks Ray for."""
        size = f"{self.min_actors}" if self.min_actors == self.max_actors else f"{self.min_actors}-{self.max_actors}"
        return f"{size} x ({self.num_cpus:g} CPU, {self.num_gpus:g} GPU)"


class Engine(Pool):
    """vLLM generation actors."""

    tensor_parallel: int = placement(1, ge=1)
    """GPUs that share one engine; num_gpus must be as many"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """weights and activations of the engine"""
    max_num_seqs: int = placement(256, ge=1)
    """sequences decoded at once"""
    kv_cache_gib: int = placement(2, ge=1)
    """key-value cache on a CPU, GiB"""
    gpu_memory_utilization: float = placement(0.9, gt=0, le=1)
    """share of a GPU's memory that the engine may take"""
    enforce_eager: bool = placement(False)
    """skip CUDA graphs: starts faster, decodes slower"""

    @model_validator(mode="after")
    def _gpus(self) -> "Engine":
        if self.tensor_parallel > 1 and self.num_gpus != self.tensor_parallel:
            raise ValueError(f"tensor_parallel={self.tensor_parallel} needs num_gpus={self.tensor_parallel}, not {self.num_gpus:g}")
        return self


class Scoring(Pool):
    """Actors that compute log-probs of given responses."""

    max_batch_tokens: int = placement(8192, ge=1)
    """tokens with padding in one forward pass"""


class Objective(Settings):
    """What an iteration minimises (METHODS: score f = beta * rho + gamma)."""

    name: Literal["logistic"] = "logistic"
    """a key of the table in actors/learner/objectives.py"""
    beta: float = Field(0.1, gt=0)
    """scale of the log ratio rho = log pi - log pi_ref"""
    gamma: float = 0.0
    """shift: log prior odds of the real class; gamma / beta nats is how far every log ratio may fall before the loss resists"""


class Training(Settings):
    """One training stage: Ray Train workers running DeepSpeed."""

    workers: int = placement(1, ge=1)
    """data-parallel workers"""
    cpus_per_worker: float = placement(1, ge=0)
    """CPUs (and threads) a worker asks Ray for"""
    gpus_per_worker: float = placement(0, ge=0)
    """GPUs a worker asks Ray for"""
    zero_stage: Literal[0, 1, 2, 3] = placement(1)
    """DeepSpeed ZeRO stage: what is sharded over the workers (1 optimizer, 2 gradients, 3 weights)"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of weights and activations in the step; bfloat16 keeps float32 master weights"""
    save_precision: Literal["float32", "bfloat16"] = "float32"
    """of the weights on disk; bfloat16 halves them and rounds away updates below 0.4 % of a weight"""
    epochs: int = Field(1, ge=1)
    """passes over the data"""
    batch_size: int = Field(8, ge=1)
    """rows (pairs) a step over all workers"""
    micro_batch_size: int = placement(4, ge=1)
    """rows a worker processes at once; the rest of its share is accumulated"""
    learning_rate: float = Field(1e-5, gt=0)
    """peak learning rate"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """how the learning rate falls after the warm-up"""
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    """share of the steps in which the learning rate rises"""
    weight_decay: float = Field(0.0, ge=0)
    """decoupled decay of AdamW"""
    max_grad_norm: float = Field(1.0, ge=0)
    """gradients are clipped to this norm; 0 turns clipping off"""
    gradient_checkpointing: bool = placement(False)
    """recompute activations in the backward pass: less memory, a third more time"""
    deepspeed: str | None = None
    """a DeepSpeed JSON of your own; where it contradicts a setting here, the job stops and names both values"""
    seed: int = 0
    """order of the rows"""

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if self.precision == "bfloat16" and self.zero_stage == 0:
            raise ValueError("precision=bfloat16 keeps its float32 master weights in ZeRO's optimizer: zero_stage=0 must be 1, 2 or 3")
        share = self.workers * self.micro_batch_size
        if self.batch_size % share:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of workers={self.workers} x micro_batch_size={self.micro_batch_size}"
            )
        return self

    def demand(self) -> str:
        """For a person: what the stage asks Ray for."""
        return f"{self.workers} x ({self.cpus_per_worker:g} CPU, {self.gpus_per_worker:g} GPU), ZeRO-{self.zero_stage}"


class Tracking(Settings):
    """Where training metrics go beside metrics.jsonl."""

    tensorboard: bool = True
    """write TensorBoard events next to metrics.jsonl"""
    wandb_project: str | None = None
    """Weights & Biases project (extra `wandb`)"""
    mlflow_uri: str | None = None
    """MLflow tracking server (extra `mlflow`)"""
