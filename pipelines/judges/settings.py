"""Settings of what evaluates: the policies, their prompts and measures, the judge, tournaments and MT-Bench."""

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from actors.settings import Engine, Sampling, Settings, placement
from pipelines.settings import Demonstrations

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Policies(Settings):
    """What is evaluated."""

    run: str | None = None
    """a run directory: its base, SFT and further policies, under their names there; by default that of run.name, if one is there"""
    paths: dict[str, str] = Field(default_factory=dict)
    """further policies, {name: directory, hub id, .gguf file or package:NAME}; without any policy that of model.path, as "model" """
    only: list[str] = Field(default_factory=list)
    """of all these only those named, and answers.reference; all by default"""

    @field_validator("paths")
    @classmethod
    def _named(cls, paths: dict[str, str]) -> dict[str, str]:
        for name in paths:
            if not NAME.fullmatch(name):
                raise ValueError(f"paths={{{name}: ...}}: names are letters, digits, and . _ - behind them")
        return paths


class Prompts(Demonstrations):
    """Prompts with demonstrations, which every policy answers."""

    section: ClassVar[str] = "prompts"

    path: str = ""
    """file, directory, glob or URI of jsonl, json, parquet, arrow or csv; a hub id; "arithmetic": generated word problems; by default
    the held-out demonstrations of the run; "none": no prompts"""
    held_out_path: None = None
    """not used here: all rows are prompts"""
    held_out_split: None = None
    """not used here: all rows are prompts"""
    held_out_fraction: float = Field(0.0, ge=0, le=0)
    """not used here: all rows are prompts"""
    held_out_limit: None = None
    """not used here: all rows are prompts"""

    @field_validator("held_out_path", "held_out_split", "held_out_fraction", "held_out_limit", mode="before")
    @classmethod
    def _none_is_held_out(cls, given: Any) -> Any:
        if given:
            raise ValueError(f"{given!r} is not used here, as all rows are prompts: leave it out")
        return given


class Answers(Sampling):
    """How the policies answer the prompts, and what is measured of it."""

    greedy: bool = True
    """take the most likely token always; temperature and top_p are then unused"""
    measures: list[str] = Field(default_factory=list)
    """of every answer: exact_answer (the number after the last #### is the demonstration's), regex:PATTERN (its first group, at its last
    place in the answer, is that in the demonstration), a golden reward model (directory, hub id or the URL of a service), or
    module:function, called with (messages, response)"""
    reference: str | None = None
    """name of a policy: the KL divergence of every other one from it, over one sample a prompt at temperature 1"""

    def drawn(self) -> Sampling:
        """How the answers are drawn."""
        return Sampling(**self.model_dump(include=set(Sampling.model_fields)))

    def free(self) -> Sampling:
        """Samples of the policy as it is: the KL divergence is a mean over them."""
        return Sampling(max_new_tokens=self.max_new_tokens, seed=self.seed)


class JudgeModel(Engine):
    """Which model judges, and how it is asked."""

    backend: Literal["vllm"] = "vllm"
    """a judge here is always a vLLM engine"""
    url: str | None = None
    """an OpenAI-compatible endpoint instead ("https://HOST/v1")"""
    url_model: str = ""
    """its name there"""
    url_key_env: str = "GSIL_JUDGE_KEY"
    """environment variable with the endpoint's key"""
    mode: Literal["text", "logprob"] = "text"
    """read the verdict from what the judge writes, or (a small model) compare the probabilities of the two labels"""
    templates: str | None = None
    """folder with templates of your own: helpful.txt, helpful.grade.txt, harmless.txt, ..."""
    max_new_tokens: int = Field(256, ge=1)
    """length of its explanation"""
    max_model_len: int = Field(4096, ge=2)
    """longest question and explanation together, tokens"""

    @field_validator("url")
    @classmethod
    def _scheme(cls, url: str | None) -> str | None:
        if url and not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r} is none: it begins with http:// or https://, such as http://HOST:8000/v1")
        return url


class Judge(JudgeModel):
    """The judge of tournaments. It is asked at temperature 0; its answers are kept, and the same question is asked once."""

    path: str | None = None
    """directory or hub id of a model that judges here"""
    cache: str | None = placement(None)
    """file with earlier answers, by question and judge; judge_answers.jsonl in the run directory by default"""
    concurrency: int = placement(16, ge=1)
    """requests to the endpoint at the same time"""
    timeout: float = placement(120, gt=0)
    """seconds for one whole answer"""
    retries: int = placement(7, ge=0)
    """times that a request that failed is made again, after 1, 2, 4 ... seconds: together longer than a limit of requests a minute lasts"""
    requests_per_minute: float | None = placement(None, gt=0)
    """to the endpoint at most; no limit by default"""
    max_requests: int | None = placement(None, ge=1)
    """to the endpoint in one go of the job, by tournament and MT-Bench together, retries included; more stop it, and what was answered
    is kept"""
    max_cost: float | None = placement(None, gt=0)
    """of one go of the job, in the currency of the prices: it stops before a question that may cost more, if that costs no more than
    the dearest before it; what was answered is kept"""
    price_in: float = placement(0, ge=0)
    """of a million tokens that the judge reads"""
    price_out: float = placement(0, ge=0)
    """of a million tokens that it writes"""
    max_failed_fraction: float = placement(0.02, ge=0, le=1)
    """a greater share of the questions (two a game) without an answer fails the tournament; an endpoint is then asked no more"""
    max_unread_fraction: float = placement(0.5, ge=0, le=1)
    """more verdicts or grades that cannot be read than this, of those that the judge gave, fail the tournament or MT-Bench"""

    @model_validator(mode="after")
    def _consistent(self) -> "Judge":
        if self.path and self.url:
            raise ValueError(f"path={self.path!r} and url={self.url!r} are two judges: give one")
        if self.templates and not Path(self.templates).is_dir():
            raise ValueError(f"templates={self.templates!r} is no folder")
        if self.url and not self.url_model:
            raise ValueError(f"url={self.url!r} needs url_model, the judge's name there")
        if self.max_cost and not (self.price_in or self.price_out):
            raise ValueError("max_cost needs price_in and price_out: without a price nothing costs anything")
        return self

    def given(self) -> bool:
        """Whether there is one."""
        return bool(self.path or self.url)


class Tournament(Settings):
    """Comparisons by the judge on the prompts: everybody against everybody, in both orders."""

    contestants: list[str] = Field(default_factory=list)
    """names of policies, of `responses`, and "demonstrations"; two or more, none by default"""
    responses: dict[str, str] = Field(default_factory=dict)
    """responses of others to the same prompts, {name: file of jsonl, json, parquet or csv in one of the usual layouts}"""
    criterion: Literal["helpful", "harmless", "summary", "mt_bench"] = "helpful"
    """what the judge is asked for"""
    limit: int | None = Field(None, ge=1)
    """prompts at most; all by default"""
    seed: int = 0
    """of the bootstrap"""

    @model_validator(mode="after")
    def _two(self) -> "Tournament":
        if len(self.contestants) == 1 or len(set(self.contestants)) < len(self.contestants):
            raise ValueError(f"contestants={self.contestants}: two or more different ones are needed")
        return self


class MtBench(Settings):
    """MT-Bench: questions of two turns, graded from 1 to 10 by the judge."""

    path: str | None = None
    """directory with question.jsonl and reference_answer_*.jsonl as published; none: no MT-Bench"""
    limit: int | None = Field(None, ge=1)
    """questions at most; all by default"""
    max_new_tokens: int = Field(512, ge=1)
    """length limit of an answer"""

    def sampling(self) -> Sampling:
        """Greedy answers."""
        return Sampling(greedy=True, max_new_tokens=self.max_new_tokens)
