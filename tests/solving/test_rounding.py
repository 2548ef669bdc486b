"""Rounding one Linear: its losses are those of its codes, and clips and feedback are kept where they lower them."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq_ext import _C, AwqConfig
from awq_ext.calibration.statistics import InputStatistics
from awq_ext.kernels import reference
from awq_ext.solving import codes as codes_module
from awq_ext.solving.gptq import Feedback
from awq_ext.solving.rounding import Rounding, divided

KERNELS = pytest.mark.parametrize("kernels", [_C, reference], ids=["compiled", "reference"])
N, K, T = 40, 48, 300


def book() -> InputStatistics:
    x = torch.randn(T, K) @ (torch.eye(K) + 0.2 * torch.randn(K, K)) * torch.rand(K).add(0.1)
    moment = x.T @ x
    return InputStatistics(SimpleNamespace(rows=T, second_moment=lambda: moment), T)


def loss_of(weight: Tensor, found: Tensor, one: InputStatistics) -> float:
    error = (found - weight).double()
    return float((error @ one.stats.second_moment().double() * error).sum()) / one.rows


@KERNELS
@pytest.mark.parametrize("damping", [0.5, 2.0])
def test_damped_losses_are_those_of_the_damped_moment(kernels: ModuleType, damping: float) -> None:
    torch.manual_seed(0)
    one, weight, scale, divisor = book(), torch.randn(N, K), torch.rand(K) + 0.5, torch.rand(N) + 0.5
    moment, config = one.stats.second_moment(), AwqConfig(group_size=16)
    codes = codes_module.round_to_nearest(kernels, divided(weight, divisor), config, scale)
    losses = codes_module.row_losses(kernels, weight, codes, scale, moment, 16, divisor, damping)
    damped = moment + damping * moment.diagonal().diag()
    expected = codes_module.row_losses(kernels, weight, codes, scale, damped, 16, divisor)
    assert torch.equal(losses.plain, codes_module.row_losses(kernels, weight, codes, scale, moment, 16, divisor).plain)
    # fp32 products and sums over K, of either sign in the full form: K^2 eps of a bound on the sum of their sizes
    error = codes.dequantize(kernels, 16, scale, divisor).sub(weight).abs().double()
    allowed = K**2 * torch.finfo(torch.float32).eps * (error @ damped.abs().double() * error).sum(1)
    assert ((losses.damped - expected.plain).abs() <= allowed).all()
    assert torch.equal(expected.plain, expected.damped)
    rows = torch.tensor([3, 17])
    assert torch.equal(losses.at(rows).damped, losses.damped[rows])
    empty = codes_module.row_losses(kernels, weight[:0], codes.rows(slice(0, 0)), scale, moment, 16)
    assert empty.plain.shape == (0,)


@KERNELS
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("search_rows", [0, 16])
def test_losses_belong_to_the_codes(kernels: ModuleType, method: str, scaled: bool, search_rows: int) -> None:
    config = AwqConfig(group_size=16, method=method, search_rows=search_rows)
    clipped = 0
    for seed in range(6):
        torch.manual_seed(seed)
        one, linear = book(), nn.Linear(K, N)
        weight = linear.weight.detach()
        scale, divisor = (torch.rand(K) * 0.1 + 0.95, torch.rand(N) * 0.1 + 0.95) if scaled else (None, None)
        rounding, moment = Rounding(kernels), one.stats.second_moment()
        layer = rounding.searched("x", linear, config, one, Feedback(kernels, moment, scale), divisor)
        plain = rounding.searched(
            "x", linear, AwqConfig(**config.to_dict() | {"clip": False}), one, Feedback(kernels, moment, scale), divisor
        )
        rtn = codes_module.round_to_nearest(kernels, weight, config)

        def found(codes: codes_module.Codes, scale: Any = scale, divisor: Any = divisor) -> Tensor:
            return codes.dequantize(kernels, 16, scale, divisor)

        # fp32 sums over K channels, errors cancelled from weights of about ten times their size
        bound = {"rel": 1e-4}
        assert layer.loss_rtn == pytest.approx(loss_of(weight, found(rtn, None, None), one), **bound)
        assert layer.loss == pytest.approx(loss_of(weight, found(layer.codes), one), **bound)
        assert plain.loss == pytest.approx(loss_of(weight, found(plain.codes), one), **bound)
        assert layer.fed_back == plain.fed_back
        clipped += layer.clipped
        if layer.clipped:
            assert torch.equal(layer.unclipped.stored, plain.codes.stored)
            assert layer.unclipped_loss == plain.loss
            assert layer.loss <= layer.loss_rtn
        else:
            assert torch.equal(layer.codes.stored, plain.codes.stored)
            assert layer.loss == plain.loss
    assert clipped, "a clip is worth it at least once"


@KERNELS
def test_nearest_has_losses_unless_there_is_a_problem(kernels: ModuleType) -> None:
    torch.manual_seed(0)
    one, linear, config = book(), nn.Linear(K, N), AwqConfig(group_size=16, method="rtn")
    layer = Rounding(kernels).nearest("x", linear, config, one)
    expected = loss_of(linear.weight.detach(), layer.codes.dequantize(kernels, 16), one)
    assert layer.loss == layer.loss_rtn == pytest.approx(expected, rel=1e-4)
    layer = Rounding(kernels).nearest("x", linear, config, one, problem="too few rows")
    assert layer.loss is None
    assert layer.method == "rtn"


@KERNELS
@pytest.mark.parametrize("scaled", [False, True])
def test_scales_of_groups_are_fitted_to_the_nearest_codes(kernels: ModuleType, scaled: bool) -> None:
    fitted = []
    for seed in range(6):
        torch.manual_seed(seed)
        one, linear = book(), nn.Linear(K, N)
        scale, divisor = (torch.rand(K) * 0.1 + 0.95, torch.rand(N) * 0.1 + 0.95) if scaled else (None, None)
        feedback = Feedback(kernels, one.stats.second_moment(), scale)
        layers = [
            Rounding(kernels).searched("x", linear, config, one, feedback, divisor)
            for config in (AwqConfig(group_size=16, clip=False, refine=refine) for refine in (0, 1))
        ]
        plain = codes_module.round_to_nearest(
            kernels, divided(linear.weight.detach(), divisor), AwqConfig(group_size=16), scale
        )
        assert all(torch.equal(layer.codes.stored, plain.stored) for layer in layers)
        assert torch.equal(layers[0].codes.scales, plain.scales)
        assert layers[1].loss <= layers[1].loss_rtn
        fitted.append(layers[1].loss / layers[0].loss)
    assert min(fitted) < 0.95, "the loss falls"


@KERNELS
def test_a_fit_that_loses_to_rtn_is_not_taken(kernels: ModuleType) -> None:
    # so much damping that only the channels' own errors count, of inputs that are all alike
    torch.manual_seed(0)
    x = torch.randn(T, 1) + 1e-3 * torch.randn(T, K)
    one = InputStatistics(SimpleNamespace(rows=T, second_moment=lambda: x.T @ x), T)
    config, undone = AwqConfig(group_size=16, clip=False, damping=1e6), 0
    for _ in range(20):
        linear = nn.Linear(K, 1)
        feedback = Feedback(kernels, one.stats.second_moment(), None)
        layer = Rounding(kernels).searched("x", linear, config, one, feedback)
        rtn, fitted = (feedback.nearest(linear.weight.detach(), config, fitted=fit) for fit in (False, True))
        assert layer.loss <= layer.loss_rtn
        lost = loss_of(linear.weight.detach(), fitted.dequantize(kernels, 16), one) > layer.loss_rtn
        assert torch.equal(layer.codes.scales, (rtn if lost else fitted).scales)
        undone += lost
    assert 0 < undone < 20
