"""gptq_factor and gptq_quantize: the factor, and every decision it leads to."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from checks import moment
from decisions import assert_decisions, assert_factor
from torch import Tensor

from awq_ext import _C
from awq_ext.kernels import reference

KERNELS = pytest.mark.parametrize("kernels", [_C, reference], ids=["compiled", "reference"])
SHAPES = [(1, 1), (7, 13), (3, 300), (20, 1), (33, 64), (40, 65), (2, 129)]


def orders(second_moment: Tensor) -> list[Tensor]:
    return [torch.arange(len(second_moment)), second_moment.diagonal().argsort(descending=True)]


@pytest.mark.parametrize("k", [1, 13, 64, 65, 129, 300])
def test_factor(kernels: ModuleType, k: int) -> None:
    second_moment = moment(k)
    for order, damping in itertools.product(orders(second_moment), (0.01, 1.0)):
        factor = kernels.gptq_factor(second_moment, order, damping)
        assert factor.dtype == torch.float32
        assert torch.equal(factor, factor.triu())
        assert (factor.diagonal() > 0).all()
        assert_factor(factor, second_moment, order, damping)


@KERNELS
@pytest.mark.parametrize("kind", ["nothing", "one row", "dead", "slightly negative"])
def test_factor_of_what_has_no_inverse(kernels: ModuleType, kind: str) -> None:
    x = torch.randn(1, 70)
    second_moment = {
        "nothing": torch.zeros(70, 70),
        "one row": x.T @ x,
        "dead": moment(70) * (torch.arange(70) < 3) * (torch.arange(70) < 3)[:, None],
        "slightly negative": x.T @ x - 1e-4 * torch.eye(70),
    }[kind]
    for damping in (0.01, 1e-7):
        factor = kernels.gptq_factor(second_moment, torch.arange(70), damping)
        assert torch.isfinite(factor).all()
        assert (factor.diagonal() > 0).all()
        weight = torch.randn(9, 70)
        codes = kernels.gptq_quantize(weight, factor, torch.arange(70), 32)[0]
        assert codes.max() <= 15
    if kind == "nothing":
        assert torch.equal(codes, kernels.quantize_weight(weight, 32)[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [-1, 128, 7])
def test_quantize(kernels: ModuleType, shape: tuple[int, int], dtype: torch.dtype, group_size: int) -> None:
    n, k = shape
    second_moment, weight, scale = moment(k), torch.randn(n, k).to(dtype), torch.rand(k) + 0.5
    variants = [
        {},
        {"symmetric": True, "bits": 3, "scale_dtype": torch.bfloat16, "channel_scale": scale},
        {"bits": 8, "clip": torch.rand(n, reference.group_count(k, group_size)) * 0.3 + 0.7},
    ]
    for kwargs in variants:
        s = kwargs.get("channel_scale")
        for order in orders(second_moment):
            factor = kernels.gptq_factor(second_moment, order, 0.01)
            parts = kernels.gptq_quantize(weight, factor, order, group_size, **kwargs)
            plain = reference.quantize_weight(weight, group_size, **kwargs)
            for mine, expected in zip(parts, plain, strict=True):
                assert mine.dtype == expected.dtype
                assert mine.shape == expected.shape
            assert torch.equal(parts[1], plain[1])
            assert torch.equal(parts[2], plain[2])
            scaled = weight.float() if s is None else weight.float() * s
            # inputs divided by s have diag(1/s) H diag(1/s) for second moment, which diag(1/s) R factors
            own = factor if s is None else factor / s[order][:, None]
            assert_decisions(parts, scaled, own, order, group_size, kwargs.get("bits", 4))


@KERNELS
def test_independent_channels_are_rounded_to_nearest(kernels: ModuleType) -> None:
    weight, diagonal = torch.randn(50, 90), torch.rand(90).add(0.1).diag()
    order = torch.randperm(90)
    factor = kernels.gptq_factor(diagonal, order)
    parts = kernels.gptq_quantize(weight, factor, order, 32)
    assert torch.equal(parts[0], reference.quantize_weight(weight, 32)[0])


def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    second_moment, weight = moment(300), torch.randn(500, 300)
    order = orders(second_moment)[1]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            factor = _C.gptq_factor(second_moment, order)
            parts = _C.gptq_quantize(weight, factor, order, 64)
            refined = (
                _C.refine_quantized(weight, *parts, second_moment, 64, scales_only=only) for only in (False, True)
            )
            results.append((factor, *parts, *itertools.chain(*refined)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_both_implementations_agree() -> None:
    second_moment, weight = moment(200), torch.randn(60, 200)
    for order in orders(second_moment):
        factor = reference.gptq_factor(second_moment, order)
        ours, expected = (k.gptq_quantize(weight, factor, order, 64)[0] for k in (_C, reference))
        # one sum rounded the other way at a tie changes the rest of its row: none of these rows has one
        assert torch.equal(ours, expected)


@KERNELS
def test_numbers_that_are_none(kernels: ModuleType) -> None:
    for value in (float("nan"), float("inf")):
        second_moment = moment(20)
        second_moment[3, 3] = value
        with pytest.raises(ValueError, match=r"second_moment.*finite"):
            kernels.gptq_factor(second_moment, torch.arange(20))
    weight, factor = torch.randn(4, 20), kernels.gptq_factor(moment(20), torch.arange(20))
    weight[0, 3], weight[1, 5], weight[2] = float("nan"), float("inf"), float("nan")
    assert kernels.gptq_quantize(weight, factor, torch.arange(20), 16)[0].max() <= 15


def test_wrong_arguments_are_named() -> None:
    second_moment, order = moment(8), torch.arange(8)
    factor, weight = _C.gptq_factor(second_moment, order), torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"order.*every channel once"):
        _C.gptq_factor(second_moment, torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]))
    with pytest.raises(ValueError, match=r"order.*every channel once"):
        _C.gptq_quantize(weight, factor, order + 1, 4)
    with pytest.raises(ValueError, match="factor"):
        _C.gptq_quantize(weight, factor[:4], order, 4)
    with pytest.raises(ValueError, match="damping"):
        _C.gptq_factor(second_moment, order, 0.0)
    with pytest.raises(TypeError, match="order"):
        _C.gptq_factor(second_moment, order.float())
