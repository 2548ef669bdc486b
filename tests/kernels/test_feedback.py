"""Error feedback and descent on codes where sums take several products, several terms and several spans of channels.

On levels with tile registers numbers are held as several bf16 (csrc/drivers/feedback.h); the others are held to the same bounds.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from checks import moment
from decisions import assert_decisions, assert_factor
from torch import Tensor

from awq_ext import _C
from awq_ext.kernels import reference


def with_bits(bits: int, *shape: int) -> Tensor:
    """Random numbers in +-[1/4, 1/2) of so many significant bits."""
    size = torch.randint(2 ** (bits - 1), 2**bits, shape).double() * 2.0 ** -(bits + 1)
    return (size * torch.randint(0, 2, shape).mul(2).sub(1)).float()


@pytest.mark.parametrize(("bits", "first", "k"), [(24, 40, 130), (24, 300, 512), (16, 512, 600)])
def test_no_product_of_terms_is_missing(kernels: ModuleType, bits: int, first: int, k: int) -> None:
    """Codes that lie 2^-20 of a product to one side of a tie.

    Channel 1 leaves errors of so many bits. Channels from ``first`` on have one factor each, of as many, and add them up. Three
    terms hold 24 bits, two hold 16, and the smallest product of terms that counts is about 2^-16 of the whole.
    """
    n, later = 70, torch.arange(first, k)
    factor = torch.eye(k)
    factor[1, first:] = with_bits(bits, k - first) * 128
    weight = torch.zeros(n, k)
    weight[:, 0], weight[:, 2] = -128, 127  # the grid: steps of 1 around 128
    weight[:, 1] = with_bits(bits, n)
    product = weight[:, 1:2].double() * factor[1, first:].double()
    near = torch.randint(-3, 4, product.shape) + 0.5 + 2.0**-20 * product
    weight[:, later] = (near - product).float()
    expected = (weight[:, later].double() + product).round() + 128
    codes = kernels.gptq_quantize(weight, factor, torch.arange(k), -1, 8)[0]
    assert torch.equal(codes[:, 1], torch.full((n,), 128, dtype=torch.uint8))
    assert torch.equal(codes[:, later].double(), expected)


@pytest.mark.parametrize(("k", "group_size"), [(545, 16), (801, 128), (1030, -1)])
def test_decisions_over_many_channels(isa: str, k: int, group_size: int) -> None:
    """Sums of two and of three terms, several spans and blocks of each, rows and channels that fill no tile."""
    second_moment, weight, scale = moment(k), torch.randn(37, k), torch.rand(k) + 0.5
    for order in (torch.arange(k), second_moment.diagonal().argsort(descending=True)):
        factor = reference.gptq_factor(second_moment, order, 0.1)
        parts = _C.gptq_quantize(weight, factor, order, group_size, channel_scale=scale)
        assert_decisions(parts, weight * scale, factor / scale[order][:, None], order, group_size, 4)
    alone = _C.gptq_quantize(weight[30:34], factor, order, group_size, channel_scale=scale)
    assert all(torch.equal(one, all_rows[30:34]) for one, all_rows in zip(alone, parts, strict=True))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(("bits", "k"), [(24, 330), (16, 600)])
def test_no_product_of_terms_is_missing_from_descent(kernels: ModuleType, bits: int, k: int, behind: bool) -> None:
    """The same for codes that are refined: one channel before or behind all others pulls on them, and stays where it is.

    Its own second moment is so large that the others hardly pull on it. All levels are 0, so no scale moves.
    """
    n, source = 40, k - 1 if behind else 0
    others = torch.arange(k) != source
    pull = with_bits(bits, k - 1) * 128
    second_moment = torch.eye(k) / 2  # damped: 1
    second_moment[source, source] = 2.0**30
    second_moment[source, others] = second_moment[others, source] = pull
    weight = torch.zeros(n, k)
    weight[:, source] = with_bits(bits, n)
    product = weight[:, source, None].double() * pull.double()
    near = torch.randint(-3, 4, product.shape) + 0.5 + 2.0**-20 * product
    weight[:, others] = (near - product).float()
    codes = torch.full((n, k), 128, dtype=torch.uint8)
    scales, zeros = torch.ones(n, 1).half(), codes[:, :1].clone()
    refined = kernels.refine_quantized(weight, codes, scales, zeros, second_moment, -1, 8)
    assert torch.equal(refined[1], scales)
    assert torch.equal(refined[0][:, source], codes[:, source])
    expected = (weight[:, others].double() + product).round() + 128
    assert torch.equal(refined[0][:, others].double(), expected)


@pytest.mark.parametrize(("k", "group_size"), [(65, 16), (300, 40), (545, 128), (609, -1)])
def test_descent_over_many_channels(isa: str, k: int, group_size: int) -> None:
    """Groups within a panel, across panels and longer than a span; steps and codes of a second round follow from the first."""
    second_moment, weight, scale = moment(k), torch.randn(37, k), torch.rand(k) + 0.5
    parts = reference.quantize_weight(weight, group_size, channel_scale=scale)
    ours, expected = (
        kernel.refine_quantized(weight, *parts, second_moment, group_size, rounds=2, channel_scale=scale)
        for kernel in (_C, reference)
    )
    # one scale or code between two others may go either way, and its row with it
    differs = (ours[0] != expected[0]).any(1) | (ours[1] != expected[1]).any(1)
    assert differs.sum() <= 2
    assert (parts[1] != expected[1]).double().mean() > 0.5


@pytest.mark.parametrize("k", [289, 513, 700])
def test_factor_of_fewer_rows_than_channels(isa: str, k: int) -> None:
    """Pivots down to 10^-4 of the diagonal: fp32 keeps them, and so do three terms of bf16.

    With two terms the factorization of the last of these fails, until ten times as much is added to the diagonal.
    """
    x = torch.randn(k // 7, k) @ torch.randn(k, k) / k**0.5 + 3 * torch.randn(k // 7, 1)
    order = torch.arange(k).flip(0)
    assert_factor(_C.gptq_factor(x.T @ x, order, 1e-4), x.T @ x, order, 1e-4)
