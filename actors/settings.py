"""Settings that a process with a model reads: sampling, engine, scorer, objective, training.

Only pydantic is imported, so that a command line can be parsed before torch, vLLM or Ray load.

A field marked with `placement(...)` says where and how fast work runs, not what comes out of it. It stays out of a stage's
fingerprint: the same run continues on a larger machine.
"""

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.presets import PRESETS


def placement(default: Any, **constraints: Any) -> Any:
    """A field that does not change a stage's result beyond rounding."""
    return Field(default, json_schema_extra={"placement": True}, **constraints)


class Settings(BaseModel):
    """Frozen, and strict about names. A field's docstring is its line in `--help`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=())

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
    """actors at least"""
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


class EnginePool(Pool):
    """Actors with a vLLM engine each."""

    tensor_parallel: int = placement(1, ge=1)
    """GPUs that share one engine; num_gpus must be as many"""
    kv_cache_gib: float = placement(2.0, gt=0)
    """key-value cache on a CPU, GiB; all of it is filled at the start, up to 3 s each"""
    gpu_memory_utilization: float = placement(0.9, gt=0, le=1)
    """share of a GPU's memory that the engine may take"""

    @model_validator(mode="after")
    def _gpus(self) -> "EnginePool":
        if self.tensor_parallel > 1 and self.num_gpus != self.tensor_parallel:
            raise ValueError(f"tensor_parallel={self.tensor_parallel} needs num_gpus={self.tensor_parallel}, not {self.num_gpus:g}")
        return self


class Engine(EnginePool):
    """Generation actors."""

    backend: Literal["vllm", "transformers"] = "vllm"
    """transformers decodes slowly and starts at once: for models of a few million parameters"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """weights and activations of the engine; auto: as policies are trained; where nothing is trained as weights are stored, of which vLLM
    makes bfloat16 if they are float32"""
    max_num_seqs: int = placement(256, ge=1)
    """sequences decoded at once; another number rounds sums in another order, and a few samples come out differently"""
    enforce_eager: bool = placement(False)
    """skip CUDA graphs: starts faster, decodes slower"""

    def as_trained(self, precision: str) -> "Engine":
        """For policies that are trained in a precision. Left to itself vLLM makes bfloat16 of float32 weights: samples would be those of
        another policy than the trained one."""
        return self.model_copy(update={"dtype": precision}) if self.dtype == "auto" else self


class Scoring(Pool):
    """Actors that compute log-probs of given responses, in the learner's own forward pass."""

    max_batch_tokens: int = placement(8192, ge=1)
    """tokens with padding in one forward pass"""


class RewardScoring(EnginePool, Scoring):
    """Actors that compute rewards of given responses."""

    backend: Literal["auto", "vllm", "transformers"] = placement("auto")
    """what a reward model runs in: auto takes vLLM where it knows the model"""


if TYPE_CHECKING:
    PresetName: TypeAlias = str
else:
    PresetName = Literal[tuple(PRESETS)]

POINTWISE = ("logistic", "hinge", "brier", "exponential", "kliep", "lsif")
SMOOTHED = ("logistic", "dpo", "fdpo_forward_kl", "fdpo_js", "fdpo_alpha", "cpo", "simpo")
READ_BY = {
    "gamma": (*POINTWISE, "simpo"),
    "length_normalised": (*POINTWISE, "kto", "dpo", "fdpo_forward_kl", "fdpo_js", "fdpo_alpha", "ipo"),
    "label_smoothing": SMOOTHED,
    "alpha": ("fdpo_alpha",),
    "delta": ("slic",),
}
"""The functions that read a number; beta, which scales rewards in the metrics too, and the SFT term belong to all."""


class Objective(Settings):
    """What training on pairs minimises, by the score f = beta * rho + gamma of a log ratio rho. A number left out is the preset's."""

    name: PresetName = "gsil_logistic"
    """a preset: a function of actors/learner/objectives.py with its numbers"""
    beta: float = Field(0.1, gt=0)
    """scale of the log ratio rho = log pi - log pi_ref"""
    gamma: float = 0.0
    """pointwise losses: log prior odds of the real class; gamma / beta nats is how far every log ratio may fall before the loss
    resists. simpo: the margin"""
    length_normalised: bool = False
    """rho per token instead of summed"""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """share of labels taken as turned round (logistic family: logistic, dpo, f-dpo, cpo, simpo)"""
    sft_weight: float = Field(0.0, ge=0)
    """adds sft_weight * SFT loss of the real response"""
    sft_weighting: Literal["uniform", "occupancy"] = "uniform"
    """of the SFT term: all tokens alike, or token k of T counted (T - k) / T times (AfD, appendix D.1)"""
    alpha: float = Field(0.5, gt=0)
    """fdpo_alpha: order of the divergence"""
    delta: float = Field(1.0, ge=0)
    """slic: margin in nats"""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        preset = PRESETS.get(str(given.get("name", cls.model_fields["name"].default)), {})
        return {key: value for key, value in preset.items() if key != "function"} | given

    @model_validator(mode="after")
    def _all_is_read(self) -> "Objective":
        for number, readers in READ_BY.items():
            value = getattr(self, number)
            if self.function not in readers and value != type(self).model_fields[number].default:
                names = ", ".join(name for name, preset in PRESETS.items() if preset["function"] in readers)
                raise ValueError(f"{number}={value} means nothing to {self.name}: only to {names}")
        if self.function == "sft" and not self.sft_weight:
            raise ValueError(
                "sft_weight=0 leaves nothing to minimise: of sft it is the only term. Set it to 1, or remove it from the config"
            )
        return self

    @property
    def pointwise(self) -> bool:
        """Whether each response is classified by its own score beta * rho + gamma."""
        return self.function in POINTWISE

    @property
    def function(self) -> str:
        """Its key in the table of functions."""
        return PRESETS[self.name]["function"]


class Training(Settings):
    """One training stage: Ray Train workers running DeepSpeed."""

    workers: int = placement(1, ge=1)
    """data-parallel workers"""
    min_workers: int | None = placement(None, ge=1)
    """go on with as few workers where the cluster has no more (elastic training)"""
    cpus_per_worker: float = placement(1, ge=0)
    """CPUs (and threads) a worker asks Ray for"""
    gpus_per_worker: float = placement(0, ge=0)
    """GPUs a worker asks Ray for"""
    zero_stage: Literal[0, 1, 2, 3] = placement(1)
    """DeepSpeed ZeRO stage: what is sharded over the workers (1 optimizer, 2 gradients, 3 weights)"""
    offload: bool = placement(False)
    """keep the optimizer's state (ZeRO 3: also the weights) in CPU memory"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of weights and activations in the step, and of the weights on disk; bfloat16 keeps float32 master weights while it trains"""
    lora_r: int = Field(0, ge=0)
    """rank of low-rank adapters (peft), merged into the policy when it is written and kept beside it; 0 trains all weights"""
    lora_alpha: int = Field(32, ge=1)
    """the adapters' update is scaled by lora_alpha / lora_r"""
    lora_targets: str = "all-linear"
    """modules that get an adapter: names joined by commas, or all-linear (all but the head)"""
    epochs: int = Field(1, ge=1)
    """passes over the data"""
    batch_size: int = Field(8, ge=1)
    """rows (pairs) a step over all workers"""
    micro_batch_tokens: int = placement(4096, ge=1)
    """tokens, with padding, that a worker processes at once; a longer row goes alone (see gradient_checkpointing)"""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """rmsprop is the papers'"""
    learning_rate: float = Field(1e-5, gt=0)
    """peak learning rate"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """how the learning rate falls after the warm-up"""
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    """share of the steps in which the learning rate rises"""
    weight_decay: float = Field(0.0, ge=0)
    """decay of the weights; decoupled with adamw"""
    max_grad_norm: float = Field(1.0, ge=0)
    """gradients are clipped to this norm; 0 turns clipping off"""
    gradient_checkpointing: bool | Literal["auto"] = placement("auto")
    """recompute activations in the backward pass, which takes less memory and a third more time: auto for rows alone that are longer than
    micro_batch_tokens"""
    checkpoint_every: int = placement(100, ge=0)
    """steps between two checkpoints of the training state, from which a stage that was stopped goes on, and one at the end; 0: none"""
    checkpoints_kept: int = placement(1, ge=1)
    """newest checkpoints that stay until the stage is done"""
    max_failures: int = placement(2, ge=0)
    """times that a stage's training goes on from the last checkpoint after workers died, and as often after Ray Train itself did"""
    deepspeed: str | None = None
    """a DeepSpeed JSON of your own; where it contradicts a setting here, the job stops and names both values"""
    seed: int = 0
    """order of the rows"""

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if self.precision == "bfloat16" and self.zero_stage == 0:
            raise ValueError("precision=bfloat16 keeps its float32 master weights in ZeRO's optimizer: zero_stage=0 must be 1, 2 or 3")
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload=true needs ZeRO's optimizer: zero_stage=0 must be 1, 2 or 3")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        if self.batch_size % self.workers:
            raise ValueError(f"batch_size={self.batch_size} does not divide among workers={self.workers}")
        return self

    def targets(self) -> list[str]:
        """`lora_targets`, name by name."""
        return [name.strip() for name in self.lora_targets.split(",")]

    def demand(self) -> str:
        """For a person: what the stage asks Ray for."""
        count = f"{self.workers}" if self.min_workers is None else f"{self.min_workers}-{self.workers}"
        return f"{count} x ({self.cpus_per_worker:g} CPU, {self.gpus_per_worker:g} GPU), ZeRO-{self.zero_stage}"


class SftTraining(Training):
    """Supervised fine-tuning: training on the demonstrations alone."""

    epochs: int = Field(2, ge=0)
    """passes over the data; 0 takes a base model that is fine-tuned already as it is"""
    learning_rate: float = Field(1e-4, gt=0)
    """peak learning rate"""
    weighting: Literal["uniform", "occupancy"] = "uniform"
    """of tokens: all alike, or token k of T counted (T - k) / T times (AfD, appendix D.1)"""

    def objective(self) -> Objective:
        """The SFT term alone."""
        return Objective(name="sft", sft_weighting=self.weighting)


class RewardTraining(Training):
    """Training of reward models."""

    lora_r: int = Field(32, ge=0)
    """rank of low-rank adapters (peft), merged into the reward model when it is written and kept beside it; 0 trains all weights"""
    epochs: int = Field(2, ge=1)
    """passes over the data"""


class Tracking(Settings):
    """Where training metrics go beside metrics.jsonl."""

    tensorboard: bool = True
    """write TensorBoard events next to metrics.jsonl"""
    wandb_project: str | None = None
    """Weights & Biases project (extra `wandb`)"""
    mlflow_uri: str | None = None
    """MLflow tracking server (extra `mlflow`)"""
