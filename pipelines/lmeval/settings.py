"""Settings of tasks: benchmarks that every policy answers, through lm-eval. Imports nothing heavy."""

from typing import Literal

from pydantic import Field, field_validator

from actors.settings import Settings, placement


class Tasks(Settings):
    """Benchmarks, through lm-eval (extra `eval`)."""

    names: list[str] = Field(default_factory=list)
    """tasks or groups of lm-eval; gsil and dil are those of the papers, truthfulqa, musr and math lm-eval's truthfulqa_mc2,
    leaderboard_musr and leaderboard_math_hard"""
    data: dict[str, str] = Field(default_factory=dict)
    """{task: local file or directory} in place of the hub, in the raw or the hub's layout; a directory has files or folders named
    train, dev or test, and one folder a subset for a group"""
    limit: int | None = Field(None, ge=1)
    """the first N rows of each task; all by default"""
    shots: dict[str, int] = Field(default_factory=dict)
    """{task: examples in front of the question}; by default the papers' (gsm8k 5, arc_challenge 25, hellaswag 10, winogrande 5, mmlu 5,
    truthfulqa 0), for other tasks lm-eval's"""
    backend: Literal["vllm", "transformers"] = "vllm"
    """what a policy runs in"""
    chat_template: bool = False
    """put prompts into the chat template, examples as earlier turns"""
    max_model_len: int | None = Field(None, ge=1)
    """longest prompt and answer, tokens: longer prompts lose their beginning; by default the context of the model"""
    batch_size: int = placement(8, ge=1)
    """transformers: rows in one forward pass; vllm takes engine.max_num_seqs"""
    allow_code_execution: bool = False
    """run the programs that a policy writes for humaneval and mbpp, in processes of limited time, memory, files and no network"""
    code_seconds: float = Field(5.0, gt=0)
    """CPU time of one program; four times as much by the clock"""
    code_memory_mib: int = Field(1024, ge=64)
    """memory of one program"""
    seed: int = 1234
    """of the choice of examples; lm-eval's own is 1234"""

    @field_validator("shots")
    @classmethod
    def _counts(cls, shots: dict[str, int]) -> dict[str, int]:
        for task, count in shots.items():
            if count < 0:
                raise ValueError(f"shots={{{task}: {count}}}: 0 or more examples are wanted")
        return shots
