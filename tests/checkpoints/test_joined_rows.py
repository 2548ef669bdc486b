"""Rows: conversions of unknown kind are followed row by row, and layers are cut and joined exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from checks import same_bits
from quantized_dirs import random_layer
from torch import Tensor

from awq_ext import CheckpointError
from awq_ext.checkpoints.formats import PackedLinear
from awq_ext.checkpoints.joined import RowNumbers, Run, cut_layer, join_layers

SIZES = {"gate": 6, "up": 6, "down": 4}


def numbers(*names: str) -> tuple[Tensor, ...]:
    return tuple(RowNumbers(SIZES).of(name) for name in names)


@pytest.mark.parametrize(
    ("weight", "runs"),
    [
        (lambda: numbers("up")[0], [("up", 0, 6)]),
        (lambda: torch.cat(numbers("gate", "up")), [("gate", 0, 6), ("up", 0, 6)]),
        (lambda: torch.cat(numbers("up", "gate")), [("up", 0, 6), ("gate", 0, 6)]),
        # numbered one after the other, but two weights
        (lambda: torch.cat(numbers("up", "down"))[4:8], [("up", 4, 6), ("down", 0, 2)]),
        (lambda: torch.stack(numbers("gate", "up")).view(2, 2, 3, 2)[1, 0], [("up", 0, 3)]),
        (lambda: numbers("down")[0][[0, 2, 1, 3]], [("down", 0, 1), ("down", 2, 3), ("down", 1, 2), ("down", 3, 4)]),
        (lambda: numbers("down")[0][[1, 1]], [("down", 1, 2), ("down", 1, 2)]),
    ],
)
def test_rows_are_found_wherever_they_went(weight: Any, runs: list[tuple[str, int, int]]) -> None:
    assert RowNumbers(SIZES).runs(weight()) == tuple(Run(*run) for run in runs)


@pytest.mark.parametrize(
    "weight",
    [
        lambda x: x.T,
        lambda x: x[:2].T,
        lambda x: x.flip(1),
        lambda x: x[:, :1],
        lambda x: x.flatten()[1:-1].view(-1, 2),
        lambda x: x[:0],
        lambda x: x[None],
        lambda x: torch.cat([x[::2, :1], x[1::2, 1:]], dim=1),
    ],
)
def test_what_is_not_made_of_whole_rows_is_seen(weight: Any) -> None:
    assert RowNumbers(SIZES).runs(weight(numbers("down")[0])) is None


def equal(one: PackedLinear, other: PackedLinear) -> bool:
    fields = ("qweight", "scales", "zeros", "bias", "pre_quant_scale")
    pairs = [(getattr(one, field), getattr(other, field)) for field in fields]
    same = all((a is None and b is None) or same_bits(a, b) for a, b in pairs)
    return same and (one.in_features, one.group_size) == (other.in_features, other.group_size)


@pytest.mark.parametrize("options", [{}, {"bias": True, "scaled": True}, {"k": 37, "g": 16}, {"g": -1}, {"bits": 8}])
def test_a_layer_cut_and_joined_again_is_the_same(options: dict[str, Any]) -> None:
    layer = random_layer(**{"n": 24} | options)
    parts = [cut_layer(layer, Run("x", low, high)) for low, high in ((0, 7), (7, 8), (8, 24))]
    assert [part.out_features for part in parts] == [7, 1, 16]
    assert torch.equal(parts[2].dequantize(), layer.dequantize()[8:])
    assert equal(join_layers(parts, "abc"), layer)
    assert cut_layer(layer, Run("x")) is layer
    with pytest.raises(CheckpointError, match="x has 24 outputs, 25 are needed"):
        cut_layer(layer, Run("x", 20, 25))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"k": 48}, r"input channels \(64, 48\)"),
        ({"g": 32}, r"group sizes \(16, 32\)"),
        ({"bits": 8}, r"bits \(4, 8\)"),
        ({"bias": True}, "biases: only one has any"),
        ({"scaled": True}, "run-time scales"),
    ],
)
def test_layers_that_differ_otherwise_are_not_joined(other: dict[str, Any], message: str) -> None:
    settings = {"n": 8, "k": 64, "g": 16}
    with pytest.raises(CheckpointError, match=f"a and b are one layer in the model, but have different {message}"):
        join_layers([random_layer(**settings), random_layer(**settings | other)], ["a", "b"])


def test_run_time_scales_must_be_the_same_numbers() -> None:
    one, other = (random_layer(8, 64, 16, scaled=True) for _ in range(2))
    with pytest.raises(CheckpointError, match="run-time scales"):
        join_layers([one, other], ["a", "b"])
    joined = join_layers([one, replace(other, pre_quant_scale=one.pre_quant_scale.clone())], ["a", "b"])
    assert torch.equal(joined.pre_quant_scale, one.pre_quant_scale)


def test_one_group_a_row_has_two_names() -> None:
    one, other = random_layer(8, 64, -1), random_layer(8, 64, 64)
    joined = join_layers([one, other], ["a", "b"])
    assert torch.equal(joined.dequantize(), torch.cat([one.dequantize(), other.dequantize()]))
