"""Random reward models, and what they score."""

from pathlib import Path

import torch
from models import write_tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from actors.learner import policy
from actors.learner.batches import Example

EXAMPLES = [Example("a", [0, 10, 11], ([20, 21, 1], [22, 1])), Example("b", [0, 12], ([23] * 9, [24, 25, 26, 1]))]


def reward_model(directory: Path, family: str) -> Path:
    """A random reward model with the tokenizer of the tiny models."""
    source = write_tiny(directory / "policy", family, std=0.2)
    torch.manual_seed(1)
    model = policy.load(str(source), "float32", None, False, "reward")
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(directory / "reward")
    AutoTokenizer.from_pretrained(source).save_pretrained(directory / "reward")
    return directory / "reward"


def one_by_one(directory: Path, prompt: list[int], response: list[int]) -> float:
    """The plain way: no batch, no padding, float64, the last position's scalar."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float64).eval()
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([[*prompt, *response]])).last_hidden_state[0, -1]
        return model.score(hidden).item()
