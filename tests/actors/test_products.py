"""Linear layers through oneDNN against torch's own."""

from pathlib import Path

import pytest
import torch
from models import write_tiny

from actors.learner import policy, products


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 48), (1, 33, 48), (2, 3, 5, 48), (0, 48)])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 80, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    found = []
    for kind in (torch.nn.Linear, products.Linear):
        layer.__class__ = kind
        y = layer(x)
        found.append([y, *torch.autograd.grad((y**2).sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-4)
    assert (type(y.grad_fn).__name__ == "ProductBackward") == (len(x) > 0)


def test_other_precisions_go_torchs_own_way() -> None:
    layer = products.Linear(8, 4).to(torch.bfloat16)
    assert "Product" not in type(layer(torch.randn(3, 8, dtype=torch.bfloat16)).grad_fn).__name__


def test_frozen_weights_get_no_gradient() -> None:
    layer = products.Linear(8, 4).requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 8))


def test_a_loaded_model_computes_so(tmp_path: Path) -> None:
    model = policy.load(str(write_tiny(tmp_path)), "float32", None, False)
    assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)} == {products.Linear}
