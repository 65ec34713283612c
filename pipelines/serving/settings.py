"""Settings of the service. Imports nothing heavy."""

from typing import Literal

from pydantic import Field, model_validator

from actors.settings import Engine, Pool, RewardScoring, Settings
from pipelines.judges.settings import JudgeModel
from pipelines.settings import Combination


class Server(Settings):
    """Where it listens, and who may come."""

    host: str = "127.0.0.1"
    """address; any other than that of this machine alone needs API keys, or no_auth"""
    port: int = Field(8000, ge=1, lt=65536)
    """TCP port"""
    run: str | None = None
    """run directory whose models are served: its reward models, and its final policy or else its SFT policy"""
    name: str = Field("gsil", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """name of the application in Ray Serve; the same name updates one that runs"""
    api_keys_env: str = "GSIL_API_KEYS"
    """environment variable with API keys, separated by commas or spaces; where it is empty and there is no file, none is asked for"""
    api_keys_file: str | None = None
    """file with an API key a line"""
    no_auth: bool = False
    """listen beyond this machine without keys"""
    trust_remote_code: bool = False
    """run Python code that comes with a model"""
    safetensors_only: bool = True
    """refuse weights in other formats, which may run code when they are read"""
    request_timeout: float = Field(300, gt=0)
    """seconds that a request may take; then it is answered 504 and its work stops"""


class Limits(Settings):
    """What one request may ask; beyond it the answer is 413 or 422, with the field and the limit."""

    body_bytes: int = Field(4 * 2**20, ge=1024)
    """of a request's body (413)"""
    messages: int = Field(256, ge=1)
    """turns of a conversation"""
    batch: int = Field(256, ge=1)
    """inputs of a request to a reward model, or prompts of one completion"""
    judge_batch: int = Field(16, ge=1)
    """questions of a request to the judge"""
    max_new_tokens: int = Field(1024, ge=1)
    """length of a response"""
    n: int = Field(64, ge=1)
    """samples of a prompt"""


class Replicas(Pool):
    """The processes of one deployment: between min_actors and max_actors, by the requests that are under way."""

    target_ongoing_requests: float = Field(8, gt=0)
    """requests that a process should have at once: more start another one, up to max_actors"""
    max_ongoing_requests: int = Field(256, ge=1)
    """requests that a process takes at once; others wait"""
    max_queued_requests: int = Field(512, ge=1)
    """requests that may wait; the next one is answered 503"""
    upscale_delay: float = Field(5, ge=0)
    """seconds of too many requests before another process starts"""
    downscale_delay: float = Field(120, ge=0)
    """seconds of too few before one ends"""


class Gateway(Replicas):
    """The HTTP gateway's processes; they hold no model."""

    num_cpus: float = Field(0.1, ge=0)
    """CPUs a process asks Ray for"""
    max_ongoing_requests: int = Field(1024, ge=1)
    """requests that a process takes at once; others wait"""


class Ensemble(Combination):
    """All reward models as one."""

    name: str | None = None
    """its name in requests; there is none without"""


class RewardService(RewardScoring, Replicas):
    """Reward models."""

    models: dict[str, str] = Field(default_factory=dict)
    """{name: directory or hub id}; else those of the run"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the forward pass"""
    max_model_len: int = Field(2048, ge=2)
    """longest conversation, tokens"""
    max_batch_tokens: int = Field(2048, ge=1)
    """tokens in one forward pass: requests that wait go together up to this"""


class PolicyService(Engine, Replicas):
    """The policy, which samples."""

    path: str | None = None
    """directory or hub id; else that of the run; "none": no policy"""
    name: str = "policy"
    """in requests"""
    max_model_len: int = Field(2048, ge=2)
    """longest prompt and response together, tokens"""


class JudgeService(JudgeModel, Replicas):
    """The judge, which compares responses."""

    path: str | None = None
    """directory or hub id of a model; "policy": the policy itself; none without"""
    name: str = "judge"
    """in requests"""

    @model_validator(mode="after")
    def _one(self) -> "JudgeService":
        if self.path and self.url:
            raise ValueError(f"path={self.path!r} and url={self.url!r} are two judges: give one")
        return self


class ServiceConfig(Settings):
    """A service."""

    server: Server = Server()
    limits: Limits = Limits()
    gateway: Gateway = Gateway()
    reward: RewardService = RewardService()
    ensemble: Ensemble = Ensemble()
    policy: PolicyService = PolicyService()
    judge: JudgeService = JudgeService()

    @model_validator(mode="after")
    def _consistent(self) -> "ServiceConfig":
        if self.ensemble.name and len(self.reward.models) == 1:
            raise ValueError(f"ensemble.name={self.ensemble.name!r}: an ensemble needs two reward models or more, there is one")
        other = self.judge.url or self.judge.path not in (None, "policy")
        if other and self.policy.path not in (None, "none") and self.judge.name == self.policy.name:
            raise ValueError(f"policy.name and judge.name are both {self.judge.name!r}: requests could not tell them apart")
        if self.ensemble.name in self.reward.models:
            raise ValueError(f"ensemble.name={self.ensemble.name!r} is the name of one of reward.models: choose another")
        return self
