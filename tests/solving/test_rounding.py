"""Rounding one Linear: its losses are those of its codes, and clips and feedback are kept where they lower them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from awq_ext import AwqConfig
from awq_ext.calibration.statistics import InputStatistics
from awq_ext.solving import codes, rounding
from awq_ext.solving.codes import round_to_nearest, row_losses
from awq_ext.solving.gptq import Quantizer
from awq_ext.solving.rounding import divided, rounded, searched
from awq_ext.solving.solution import LayerSolution
from awq_ext.solving.tasks import LayerTask

N, K, T = 40, 48, 300


def statistics() -> InputStatistics:
    x = torch.randn(T, K) @ (torch.eye(K) + 0.2 * torch.randn(K, K)) * torch.rand(K).add(0.1)
    moment = x.T @ x
    return InputStatistics(
        SimpleNamespace(rows=T, second_moment=lambda: moment, abs_sum=lambda: x.double().abs().sum(0)), T
    )


def loss_of(weight: Tensor, found: Tensor, one: InputStatistics) -> float:
    error = (found - weight).double()
    return float((error @ one.second_moment.double() * error).sum()) / one.rows


@pytest.mark.parametrize("damping", [0.5, 2.0])
def test_damped_losses_are_those_of_the_damped_moment(backend: None, damping: float) -> None:
    torch.manual_seed(0)
    one, weight, scale, divisor = statistics(), torch.randn(N, K), torch.rand(K) + 0.5, torch.rand(N) + 0.5
    moment, config = one.second_moment, AwqConfig(group_size=16)
    found = round_to_nearest(divided(weight, divisor), config, scale)
    losses = row_losses(weight, found, moment, scale, divisor, damping)
    damped = moment + damping * moment.diagonal().diag()
    expected = row_losses(weight, found, damped, scale, divisor)
    assert torch.equal(losses.plain, row_losses(weight, found, moment, scale, divisor).plain)
    # fp32 products and sums over K, of either sign in the full form: K^2 eps of a bound on the sum of their sizes
    error = found.dequantize(scale, divisor).sub(weight).abs().double()
    allowed = K**2 * torch.finfo(torch.float32).eps * (error @ damped.abs().double() * error).sum(1)
    assert ((losses.damped - expected.plain).abs() <= allowed).all()
    assert torch.equal(expected.plain, expected.damped)
    rows = torch.tensor([3, 17])
    assert torch.equal(losses.at(rows).damped, losses.damped[rows])
    empty = row_losses(weight[:0], found.rows(slice(0, 0)), moment, scale)
    assert empty.plain.shape == (0,)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("search_rows", [0, 16])
def test_losses_belong_to_the_codes(backend: None, method: str, scaled: bool, search_rows: int) -> None:
    config = AwqConfig(group_size=16, method=method, search_rows=search_rows)
    clipped = 0
    for seed in range(6):
        torch.manual_seed(seed)
        one, linear = statistics(), nn.Linear(K, N)
        weight = linear.weight.detach()
        scale, divisor = (torch.rand(K) * 0.1 + 0.95, torch.rand(N) * 0.1 + 0.95) if scaled else (None, None)
        layer = searched(LayerTask("x", linear, config, one), Quantizer(one.second_moment, scale), divisor)
        unclipped = AwqConfig(**config.to_dict() | {"clip": False})
        plain = searched(LayerTask("x", linear, unclipped, one), Quantizer(one.second_moment, scale), divisor)
        rtn = round_to_nearest(weight, config)

        # fp32 sums over K channels, errors cancelled from weights of about ten times their size
        bound = {"rel": 1e-4}
        assert layer.loss_rtn == pytest.approx(loss_of(weight, rtn.dequantize(), one), **bound)
        assert layer.loss == pytest.approx(loss_of(weight, layer.weight(), one), **bound)
        assert plain.loss == pytest.approx(loss_of(weight, plain.weight(), one), **bound)
        assert layer.gptq == plain.gptq
        clipped += layer.clipped
        if layer.clipped:
            full = layer.unclipped.solve()
            assert torch.equal(full.found.qweight, plain.found.qweight)
            assert full.loss == plain.loss
            assert not full.clipped
            assert layer.loss <= layer.loss_rtn
        else:
            assert torch.equal(layer.found.qweight, plain.found.qweight)
            assert layer.loss == plain.loss
    assert clipped, "a clip is worth it at least once"


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_fast_losses_change_no_choice(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    tries = {False: 0, True: 0}
    search = rounding._searched

    def counted(job: rounding._Job, clips: bool) -> LayerSolution:
        tries[job.ranking] += 1
        return search(job, clips)

    monkeypatch.setattr(rounding, "_searched", counted)
    monkeypatch.setattr(codes, "_RANKING_ERROR", 0.1)  # so that some are close
    config, seeds = AwqConfig(group_size=16, method=method), range(12)
    for seed in seeds:
        torch.manual_seed(seed)
        one, linear = statistics(), nn.Linear(K, N)
        task, scale = LayerTask("x", linear, config, one), torch.rand(K) * 0.1 + 0.95
        monkeypatch.setattr(rounding, "_FEWEST_RANKED", K + 1)
        exact = searched(task, Quantizer(one.second_moment, scale))
        monkeypatch.setattr(rounding, "_FEWEST_RANKED", K)
        fast = searched(task, Quantizer(one.second_moment, scale))
        assert (fast.clipped, fast.gptq, fast.method) == (exact.clipped, exact.gptq, exact.method)
        for name in ("qweight", "scales", "zeros"):
            assert torch.equal(getattr(fast.found, name), getattr(exact.found, name))
        # rounding both factors to bf16 moves the loss of a row by about 0.4 %; over rows that averages out
        assert fast.loss == pytest.approx(exact.loss, rel=1e-2)
        assert fast.loss_rtn == pytest.approx(exact.loss_rtn, rel=1e-2)
        if fast.clipped:
            assert torch.equal(fast.unclipped.solve().found.qweight, exact.unclipped.solve().found.qweight)
    assert tries[True] == len(seeds)
    assert len(seeds) < tries[False] < 2 * len(seeds), "some are too close, but not all"


def test_nearest_has_losses_unless_there_is_a_problem(backend: None) -> None:
    torch.manual_seed(0)
    one, linear, config = statistics(), nn.Linear(K, N), AwqConfig(group_size=16, method="rtn")
    layer = rounded(LayerTask("x", linear, config, one))
    expected = loss_of(linear.weight.detach(), layer.weight(), one)
    assert layer.loss == layer.loss_rtn == pytest.approx(expected, rel=1e-4)
    layer = rounded(LayerTask("x", linear, config, one, problem="too few rows"))
    assert layer.loss is None
    assert layer.method == "rtn"


@pytest.mark.parametrize("scaled", [False, True])
def test_scales_of_groups_are_fitted_to_the_nearest_codes(backend: None, scaled: bool) -> None:
    fitted = []
    for seed in range(6):
        torch.manual_seed(seed)
        one, linear = statistics(), nn.Linear(K, N)
        scale, divisor = (torch.rand(K) * 0.1 + 0.95, torch.rand(N) * 0.1 + 0.95) if scaled else (None, None)
        quantizer = Quantizer(one.second_moment, scale)
        layers = [
            searched(LayerTask("x", linear, config, one), quantizer, divisor)
            for config in (AwqConfig(group_size=16, clip=False, refine=refine) for refine in (0, 1))
        ]
        plain = round_to_nearest(divided(linear.weight.detach(), divisor), AwqConfig(group_size=16), scale)
        assert all(torch.equal(layer.found.qweight, plain.qweight) for layer in layers)
        assert torch.equal(layers[0].found.scales, plain.scales)
        assert layers[1].loss <= layers[1].loss_rtn
        fitted.append(layers[1].loss / layers[0].loss)
    assert min(fitted) < 0.95, "the loss falls"


def test_a_fit_that_loses_to_rtn_is_not_taken(backend: None) -> None:
    # so much damping that only the channels' own errors count, of inputs that are all alike
    torch.manual_seed(0)
    x = torch.randn(T, 1) + 1e-3 * torch.randn(T, K)
    one = InputStatistics(
        SimpleNamespace(rows=T, second_moment=lambda: x.T @ x, abs_sum=lambda: x.double().abs().sum(0)), T
    )
    config, undone = AwqConfig(group_size=16, clip=False, damping=1e6), 0
    for _ in range(20):
        linear = nn.Linear(K, 1)
        quantizer = Quantizer(one.second_moment)
        layer = searched(LayerTask("x", linear, config, one), quantizer)
        rtn, fitted = (quantizer.nearest(linear.weight.detach(), config, fitted=fit) for fit in (False, True))
        assert layer.loss <= layer.loss_rtn
        lost = loss_of(linear.weight.detach(), fitted.dequantize(), one) > layer.loss_rtn
        assert torch.equal(layer.found.scales, (rtn if lost else fitted).scales)
        undone += lost
    assert 0 < undone < 20
