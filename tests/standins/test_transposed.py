"""What does a Linear's work without being one is found by trying, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from awq_ext.standins.transposed import computes_linear, linear_of, multiplies_transposed, with_weight_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Layer(nn.Module):
    """Computes ``how(x, weight, bias)`` with a weight [K, N]."""

    def __init__(self, how: Callable[[Tensor, Tensor, Tensor], Tensor], outputs: int = 5) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(7, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight + bias


OTHERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "no bias": lambda x, w, b: x @ w,
    "clamped": lambda x, w, b: linear(x, w, b).clamp(-100, 100),
    "activated": lambda x, w, b: linear(x, w, b).relu(),
    "scaled": lambda x, w, b: linear(x, w, b) * 1.25,
    "another dtype": lambda x, w, b: linear(x, w, b).double(),
    "a tuple": lambda x, w, b: (linear(x, w, b),),
    "an error": lambda x, w, b: linear(x, w, b) / None,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_transposed_layer_is_found(dtype: torch.dtype) -> None:
    assert multiplies_transposed(Layer(linear).to(dtype))
    assert multiplies_transposed(Layer(lambda x, w, b: torch.addmm(b, x, w)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", OTHERS.values(), ids=OTHERS)
def test_layers_that_do_something_else_are_not(how: Callable[..., Tensor], dtype: torch.dtype) -> None:
    assert not multiplies_transposed(Layer(how).to(dtype))


def test_nor_are_layers_that_hold_more() -> None:
    layer = Layer(linear)
    layer.register_buffer("scale", torch.ones(1))
    assert not multiplies_transposed(layer)
    assert not multiplies_transposed(Layer(linear).to("meta"))
    assert not multiplies_transposed(nn.Linear(7, 7))


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Logged(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def test_linears_with_a_forward_of_their_own_are_tried() -> None:
    assert computes_linear(nn.Linear(4, 4))
    assert computes_linear(Logged(4, 4))
    assert not computes_linear(Twice(4, 4))
    adapted = Logged(4, 4)
    adapted.adapter = nn.Linear(4, 4)
    assert not computes_linear(adapted)


def test_a_linear_made_of_a_layer_and_the_layer_made_of_it_compute_the_same() -> None:
    layer, x = Layer(linear).eval(), torch.randn(3, 7)
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *given: seen.append(given[-1]))
    made = linear_of(layer)
    torch.testing.assert_close(made(x), layer(x))
    assert len(seen) == 2  # the hooks of the user's come along, and his handle still removes them
    handle.remove()
    made(x)
    assert len(seen) == 2
    assert not made.training
    assert made.bias is layer.bias
    back = with_weight_of(layer, made)
    assert torch.equal(back(x), layer(x))
    assert torch.equal(back.weight, layer.weight)
    assert back.weight is not layer.weight
