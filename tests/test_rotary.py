"""The rotation that takes the place of transformers' own, against it."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_tiny

from actors.learner import policy, rotary


def theirs(family: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' function from a fresh copy of its module: in the one in use it may be ours already."""
    name = f"transformers.models.{family}.modeling_{family}"
    importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return importlib.import_module(name).apply_rotary_pos_emb


@pytest.mark.parametrize("family", rotary.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_transformers_to_the_bit(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, heads, 33, 64).to(dtype).requires_grad_() for heads in (4, 2))
    angles = torch.randn(2, 33, 32).to(dtype).repeat(1, 1, 2)
    found = []
    original = theirs(family, monkeypatch)
    assert original is not rotary.rotate
    for function in (original, rotary.rotate):
        turned = function(q, k, angles.cos(), angles.sin())
        found.append([*turned, *torch.autograd.grad(sum((t**3).sum() for t in turned), (q, k))])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize(("family", "ours"), [("llama", True), ("qwen2", True), ("gpt_neox", False)])
def test_a_loaded_model_of_a_known_family_uses_it(family: str, ours: bool, tmp_path: Path) -> None:
    model = policy.load(str(write_tiny(tmp_path, family)), "float32", None, False)
    assert (vars(sys.modules[type(model).__module__])["apply_rotary_pos_emb"] is rotary.rotate) == ours
    kinds = [type(node).__name__ for node in _graph(model(torch.tensor([[0, 5, 6]])).logits.sum().grad_fn)]
    assert kinds.count("TurnBackward") == (4 if ours else 0), "queries and keys of two layers"


def _graph(node: Any) -> list[Any]:
    seen, waiting = [], [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.append(node)
            waiting += [parent for parent, _ in node.next_functions]
    return seen
