"""FrozenTensor: read like any other tensor, and no way to write to it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from awq_ext import QuantLinear
from awq_ext.kernels import reference
from awq_ext.layers.frozen import FrozenTensor
from awq_ext.layers.quantized_weight import QuantizedWeight


def made() -> QuantLinear:
    codes, scales, zeros = reference.quantize_weight(torch.randn(8, 32), 16)
    return QuantLinear.from_packed(nn.Linear(32, 8), QuantizedWeight.of_codes(codes, scales, zeros, 16))


def shifted(weight: Tensor) -> None:
    weight.data += 1


def replaced(weight: Tensor) -> None:
    weight.data = torch.zeros(8, 32)


def indexed(weight: Tensor) -> None:
    weight[0, 0] = 1


def doubled(weight: Tensor) -> None:
    weight *= 2


WRITERS: list[Callable[[Tensor], object]] = [
    shifted,
    replaced,
    indexed,
    doubled,
    lambda weight: weight.zero_(),
    lambda weight: weight.data.copy_(torch.ones(8, 32)),
    nn.init.normal_,
    lambda weight: torch.add(torch.ones(8, 32), 1, out=weight),
]


@pytest.mark.parametrize("write", WRITERS)
def test_it_cannot_be_written(write: Callable[[Tensor], object]) -> None:
    layer = made()
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match="dequantized copy"):
        write(layer.weight)
    assert torch.equal(layer.weight, before)


def subtracted(weight: Tensor) -> None:
    weight -= 0


@pytest.mark.parametrize(
    "write",
    [
        subtracted,
        lambda weight: weight.div_(2**0),
        lambda weight: weight.data.mul_(1.0),
        lambda weight: weight.copy_(weight.clone()),
    ],
)
def test_what_changes_no_value_is_no_write(write: Callable[[Tensor], object]) -> None:
    layer = made()
    before = layer.weight.clone()
    weight = layer.weight
    write(weight)
    assert torch.equal(weight, before) and torch.equal(layer.weight, before)
    with pytest.raises(RuntimeError, match="dequantized copy"):
        weight.add_(1)  # it is frozen still


def test_a_multiplication_that_is_done_already_may_be_repeated() -> None:
    layer = made()
    layer.rescaled = 0.5
    before = layer.weight.clone()
    weight = layer.weight
    assert weight.div_(2) is weight
    assert torch.equal(weight, before) and torch.equal(layer.weight, before)
    for write in (lambda: layer.weight.mul_(2), lambda: layer.weight.div_(4), lambda: layer.weight.data.div_(2)):
        with pytest.raises(RuntimeError, match="dequantized copy"):
            write()


def test_results_are_plain_tensors() -> None:
    """Even where an operation returns its argument: what was copied on purpose can be written."""
    weight = made().weight
    plain = torch.tensor(weight.tolist())
    for found in (
        weight + 0,
        weight.clone(),
        weight.float(),
        weight.contiguous(),
        weight.detach(),
        copy.deepcopy(weight),
    ):
        assert type(found) is Tensor and torch.equal(found, plain)
    own = weight.float()
    own += 1
    assert type(weight) is FrozenTensor and not weight.requires_grad
    assert [len(row) for row in weight] == [32] * 8 and (weight @ torch.ones(32)).shape == (8,)
    assert weight.requires_grad_().requires_grad


def test_it_can_be_looked_at_and_saved() -> None:
    weight = made().weight
    assert weight.numpy().shape == (8, 32) and "tensor(" in repr(weight.detach()) and repr(weight)
    file = io.BytesIO()
    torch.save({"w": weight}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["w"]
    assert type(loaded) is Tensor and torch.equal(loaded, weight)
