"""Coordinate descent on quantized weights: scales and codes in turn, and scales alone."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from checks import RANKS_IN_BF16, moment
from torch import Tensor

from awq_ext import _C
from awq_ext.kernels import reference

EPS = 2.0**-24  # relative error of one fp32 operation
SHAPES = [(1, 1), (7, 13), (3, 300), (20, 1), (33, 64), (40, 65), (2, 129)]


def refined_loss(
    weight: Tensor, parts: tuple[Tensor, ...], second_moment: Tensor, group_size: int, damping: float = 1.0
) -> Tensor:
    """Of each row, in fp64, with the diagonal raised by ``damping`` (1: counted twice)."""
    error = (reference.dequantize_weight(*parts, group_size) - weight.float()).double()
    h = second_moment.double() + damping * second_moment.double().diagonal().diag()
    return ((error @ h) * error).sum(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [-1, 128, 7])
def test_refine(kernels: ModuleType, shape: tuple[int, int], dtype: torch.dtype, group_size: int) -> None:
    n, k = shape
    second_moment, weight = moment(k), torch.randn(shape).to(dtype)
    for bits, symmetric, scale_dtype in ((4, False, torch.float16), (3, True, torch.bfloat16)):
        parts = reference.quantize_weight(weight, group_size, bits, symmetric, scale_dtype)
        unchanged = tuple(part.clone() for part in parts)
        losses = [refined_loss(weight, parts, second_moment, group_size)]
        for rounds in (0, 1, 2):
            refined = kernels.refine_quantized(weight, *parts, second_moment, group_size, bits, 1.0, rounds)
            assert refined[0].max() < 2**bits
            assert torch.equal(refined[2], parts[2])
            losses.append(refined_loss(weight, refined, second_moment, group_size))
        assert all(torch.equal(a, b) for a, b in zip(parts, unchanged, strict=True))
        assert torch.equal(losses[0], losses[1])  # no round, no change
        # A code never raises the loss (up to fp32 sums); a step may by its rounding to 11 or 8 bits, which is off by half a
        # unit: (step * 2^-8)^2 of what the levels weigh, levels below 2^bits.
        level = reference.dequantize_weight(parts[0], torch.ones_like(parts[1]), parts[2], group_size).double().abs()
        steps = reference.expand_groups(parts[1].double(), k, group_size)
        most = 2 * level * steps * 2.0**-8
        slack = ((most @ (second_moment.double().abs() * 2)) * most).sum(1) + 1e-4 * losses[0]
        assert (losses[2] <= losses[0] + slack).all()
        assert losses[3].sum() <= losses[2].sum() + slack.sum()
        if n * k > 1000:
            assert losses[2].sum() < 0.9 * losses[0].sum()


def test_refined_codes_are_best_one_by_one(isa: str) -> None:
    second_moment, weight = moment(100), torch.randn(40, 100)
    parts = _C.quantize_weight(weight, 32)
    for _ in range(30):  # until nothing changes any more
        before, parts = parts, _C.refine_quantized(weight, *parts, second_moment, 32)
    settled = (parts[0] == before[0]).all(1) & (parts[1] == before[1]).all(1)
    assert settled.sum() > 20
    best = refined_loss(weight, parts, second_moment, 32)
    for channel in range(0, 100, 7):
        for change in (-1, 1):
            codes = parts[0].clone()
            codes[:, channel] = (codes[:, channel].int() + change).clamp(0, 15).byte()
            other = refined_loss(weight, (codes, *parts[1:]), second_moment, 32)
            # fp32 sums: relative 2^-24 times the number of terms, far below 1e-4
            assert (best <= other * (1 + 1e-4))[settled].all()


def test_both_implementations_refine_alike() -> None:
    second_moment, weight, scale = moment(150), torch.randn(50, 150), torch.rand(150) + 0.5
    parts = reference.quantize_weight(weight, 64, channel_scale=scale)
    ours, expected = (
        k.refine_quantized(weight, *parts, second_moment, 64, channel_scale=scale) for k in (_C, reference)
    )
    # A scale whose exact value lies between two storable ones may be rounded either way, and its row then goes another way
    same = (ours[1] == expected[1]).all(1) & (ours[0] == expected[0]).all(1)
    assert same.sum() >= 45


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [-1, 128, 7])
def test_scales_alone_are_set_to_their_best(
    kernels: ModuleType, shape: tuple[int, int], dtype: torch.dtype, group_size: int
) -> None:
    n, k = shape
    second_moment, weight, scale = moment(k), torch.randn(shape).to(dtype), torch.rand(k) + 0.5
    parts = reference.quantize_weight(weight, group_size, channel_scale=scale)
    codes, fitted, zeros = kernels.refine_quantized(
        weight, *parts, second_moment, group_size, channel_scale=scale, scales_only=True
    )
    assert torch.equal(codes, parts[0])
    assert torch.equal(zeros, parts[2])
    # The last group was set when all the others had their places: it is where the derivative is 0, in fp64.
    h = second_moment.double() / (scale.double() * scale.double()[:, None])
    own = h.diagonal()
    own.copy_(torch.where(own > 0, own * 2, 1e-6 * own.mean()))
    g = reference.group_length(k, group_size)
    last = slice((k - 1) // g * g, k)
    level = parts[0].double() - reference.expand_groups(parts[2].double(), k, group_size)
    steps = fitted.double()
    others = (level * reference.expand_groups(steps, k, group_size)).index_fill(1, torch.arange(last.start, k), 0)
    left = weight.double() * scale.double() - others
    size = ((level[:, last] @ h[last, last]) * level[:, last]).sum(1)
    best = (left @ h[:, last] * level[:, last]).sum(1) / size
    before = parts[1][:, -1].double()
    sure = (best > 0.51 * before) & (best < 1.99 * before)
    # Sums over K in fp32, of terms of either sign: gamma_K of the sum of their sizes; and half a unit of fp16 (or of its
    # smallest number).
    weighed = h[:, last].abs() @ level[:, last].abs().T  # [K, N]
    sizes = (left.abs() * weighed.T).sum(1) / size
    allowed = EPS * (4 * k + 16) * sizes + 2.0**-11 * best.abs() + 2.0**-25
    if kernels is _C and _C.isa() in RANKS_IN_BF16:
        # The step moves by along / size, and both are sums with factors rounded by u at most: errors and H in the one, H
        # alone in the other, (along' / size' - along / size) = (along' - along - (size' - size) along / size) / size'.
        u = 2.0**-8
        errors = left.index_add(1, torch.arange(last.start, k), level[:, last] * before[:, None], alpha=-1)
        off_along = (2 * u + u * u) * (errors.abs() * weighed.T).sum(1)
        off_size = u * (level[:, last].abs() * weighed.T[:, last]).sum(1)
        allowed += (off_along + off_size * (best - before).abs()) / (size - off_size).clamp(min=0)
    assert ((steps[:, -1] - best).abs() <= allowed)[sure].all()
    assert not sure.any() or n * k < 50 or sure.sum() > n // 2


@pytest.mark.parametrize("group_size", [-1, 128, 16, 7])
@pytest.mark.parametrize("bits", [4, 8])
def test_fitted_scales_lose_as_little_on_every_level(isa: str, group_size: int, bits: int) -> None:
    second_moment, weight = moment(300), torch.randn(60, 300)
    parts = reference.quantize_weight(weight, group_size, bits)
    before = refined_loss(weight, parts, second_moment, group_size).sum()
    # What csrc/drivers/refine_scales.cpp derives for factors in bf16: 1.3e-5 of the loss a group, and changes of random sign,
    # which add up to less over the rows. In fp32 they are the reference's scales but for some that lie between two storable ones.
    tolerance = 1.3e-5 * reference.group_count(300, group_size)
    for rounds in (1, 2):
        ours, expected = (
            kernels.refine_quantized(weight, *parts, second_moment, group_size, bits, 1.0, rounds, scales_only=True)
            for kernels in (_C, reference)
        )
        loss, least = (refined_loss(weight, p, second_moment, group_size).sum() for p in (ours, expected))
        assert (loss - least).abs() <= tolerance * least
        assert loss < before * (1 - 20 * tolerance)
        if isa not in RANKS_IN_BF16:
            assert (ours[1] != expected[1]).double().mean() < 0.01


def test_scales_are_fitted_in_fp32_where_damping_is_small(isa: str) -> None:
    second_moment, weight = moment(300), torch.randn(60, 300)
    parts = reference.quantize_weight(weight, 16)
    ours, expected = (
        kernels.refine_quantized(weight, *parts, second_moment, 16, damping=0.01, scales_only=True)[1]
        for kernels in (_C, reference)
    )
    # some lie between two storable ones; of those that bf16 gives, one in twenty is another
    assert (ours != expected).double().mean() < 0.01


def test_each_row_is_fitted_alone(isa: str) -> None:
    second_moment, weight = moment(150), torch.randn(90, 150)
    parts = reference.quantize_weight(weight, 32)
    together = _C.refine_quantized(weight, *parts, second_moment, 32, scales_only=True)[1]
    for first, last in ((0, 1), (3, 40), (89, 90)):
        rows = slice(first, last)
        some = _C.refine_quantized(weight[rows], *(p[rows] for p in parts), second_moment, 32, scales_only=True)[1]
        assert torch.equal(some, together[rows])


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_dead_channels_do_not_pull_on_the_scales(kernels: ModuleType, size: float) -> None:
    x = torch.randn(600, 256) * size
    x[:, ::8] = 0
    second_moment, weight = x.T @ x, torch.randn(100, 256)
    parts = reference.quantize_weight(weight, 64)
    fitted = kernels.refine_quantized(weight, *parts, second_moment, 64, scales_only=True)
    before, after = (refined_loss(weight, p, second_moment, 64).sum() for p in (parts, fitted))
    assert after < 0.985 * before
    # what the scales would be if those channels were not there
    alive = torch.arange(256) % 8 != 0
    fewer = [parts[0][:, alive], parts[1], parts[2]]
    alone = kernels.refine_quantized(weight[:, alive], *fewer, second_moment[alive][:, alive], 56, scales_only=True)
    assert (alone[1] != fitted[1]).double().mean() < 0.05  # between two storable ones
