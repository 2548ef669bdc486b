"""Symmetric grids: the weight of largest magnitude gets code 0, by a negative scale where it is positive."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from checks import moment
from torch import Tensor

from awq_ext.kernels import reference

BITS = (2, 3, 4, 8)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_the_largest_weight_is_exact_whatever_its_sign(
    kernels: ModuleType, bits: int, scale_dtype: torch.dtype
) -> None:
    weight = torch.rand(6, 64) * 2 - 1
    # of few significant bits, so that a power of two below it is a scale in either type
    largest = torch.tensor([1.25, 3.0, 1.0625]).repeat(2) * torch.tensor([1.0, 1, 1, -1, -1, -1])
    weight[:, 5] = largest
    codes, scales, zeros = kernels.quantize_weight(weight, 32, bits, True, scale_dtype)
    assert (zeros == 2 ** (bits - 1)).all()
    assert torch.equal(scales[:, 0].float(), -largest / 2 ** (bits - 1))
    assert (codes[:, 5] == 0).all()
    assert torch.equal(kernels.dequantize_weight(codes, scales, zeros, 32)[:, 5], largest)


def test_groups_without_a_single_largest_weight(kernels: ModuleType) -> None:
    """Both signs, all equal, all 0: a positive scale, as before; and a range that is clipped keeps the sign."""
    weight = torch.zeros(4, 8)
    weight[0, 2], weight[0, 3], weight[1], weight[3, 1] = 2.0, -2.0, 0.5, 4.0
    clip = torch.tensor([1.0, 1.0, 1.0, 0.5])[:, None]
    codes, scales, zeros = kernels.quantize_weight(weight, 8, 4, True, clip=clip)
    assert scales.flatten().tolist() == [0.25, 0.5, 2.0**-24, -0.25]
    value = kernels.dequantize_weight(codes, scales, zeros, 8)
    assert (value[0, 3], value[0, 2]) == (-2.0, 1.75)
    assert torch.equal(value[1:3], weight[1:3]) and value[3].tolist() == [0, 2.0, *[0] * 6]


def mean_square(weight: Tensor, value: Tensor) -> float:
    return float((weight - value).double().square().mean())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_normal_weights_lose_less_than_on_steps_of_the_whole_range(group_size: int, bits: int) -> None:
    """Than with max|w| / (2^(bits - 1) - 0.5), of which the lowest value lies half a step beyond the weights."""
    weight, middle = torch.randn(512, 512), 2 ** (bits - 1)
    steps = weight.unflatten(1, (-1, group_size)).abs().amax(-1) / (middle - 0.5)
    steps = steps.half().float().repeat_interleave(group_size, 1)
    half_a_step_beyond = (weight / steps).round().clamp(-middle, middle - 1) * steps
    value = reference.dequantize_weight(*reference.quantize_weight(weight, group_size, bits, True), group_size)
    assert mean_square(weight, value) < mean_square(weight, half_a_step_beyond)


@pytest.mark.parametrize("scales_only", [False, True])
def test_refining_turned_weights_turns_their_scales(kernels: ModuleType, scales_only: bool) -> None:
    """A scale's sign is no more than a choice: of -W all scales are those of W, turned, and the codes are the same."""
    weight, second_moment = torch.randn(9, 96), moment(96)
    found = []
    for sign in (1, -1):
        parts = kernels.quantize_weight(sign * weight, 32, 4, True)
        found.append(kernels.refine_quantized(sign * weight, *parts, second_moment, 32, scales_only=scales_only))
    assert bool((found[0][1] < 0).any()) and bool((found[0][1] > 0).any())
    assert torch.equal(found[0][1], -found[1][1]) and torch.equal(found[0][0], found[1][0])
