"""Settings of the reproduction: the tiny model, its problems, its training, what is run."""

from typing import Literal

from pydantic import Field, model_validator

from actors.settings import Pool, Settings, Training, placement

TABLES = ("gsil", "gsil_rewards", "gsil_grid", "dil", "afd", "afd_rewards", "beyond")
TableName = Literal["gsil", "gsil_rewards", "gsil_grid", "dil", "afd", "afd_rewards", "beyond"]


class Tiny(Settings):
    """The model that is trained from scratch: a Llama with heads of 32."""

    hidden_size: int = Field(128, ge=32, multiple_of=32)
    """width; the MLP is four times as wide"""
    layers: int = Field(4, ge=1)
    """layers"""
    context: int = Field(160, ge=32)
    """longest prompt and response, tokens"""


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
