"""Rescaling: by which power of two a weight was multiplied in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from awq_ext.pipeline.rescaled import Rescaling


@pytest.mark.parametrize(
    ("write", "factor"),
    [
        (lambda weight: None, 1.0),
        (lambda weight: weight.div_(4), 0.25),
        (lambda weight: weight.mul_(8), 8.0),
        (lambda weight: weight.mul_(3), 1.0),
        (lambda weight: weight.mul_(-2), 1.0),
        (lambda weight: weight.add_(1), 1.0),
        (lambda weight: weight.mul_(2)[0, 0].add_(1), 1.0),
        (lambda weight: weight.zero_(), 1.0),
    ],
)
def test_powers_of_two_are_told(write: Callable[[Tensor], object], factor: float) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    found = Rescaling(model)
    with torch.no_grad():
        write(model[2].weight)
    assert found.factor("2", model[2].weight) == factor
    assert found.factor("0", model[0].weight) == 1
    assert found.factor("another", model[2].weight) == 1


def test_a_row_of_zeros_and_weights_without_values() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2, device="meta"))
    with torch.no_grad():
        model[0].weight[0] = 0
        found = Rescaling(model)
        model[0].weight.add_(1)
    assert found.factor("0", model[0].weight) == 1
    assert found.factor("1", model[1].weight) == 1
