"""The worked examples of the theory: by plain arithmetic, by the kernels, and by ``quantize()``."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import awq_ext
from awq_ext import _C, QuantLinear
from awq_ext.kernels import reference
from awq_ext.solving.scales import candidate_scales, weight_mean

both_kernels = pytest.mark.parametrize("kernels", [_C, reference], ids=["compiled", "reference"])
both_backends = pytest.mark.parametrize("backend", ["compiled", "reference"])

# weights, the activations they meet, importances, the most important channel
PAIR = ((0.20, 1.20), (20.0, 0.5), (4.0, 0.6), 0)
EXERCISE = ((0.3, 1.0, -0.2), (15.0, 0.8, 12.0), (4.5, 0.8, 2.4), 0)
examples = pytest.mark.parametrize(
    ("weights", "activations", "importances", "protect"), [PAIR, EXERCISE], ids=["pair", "exercise"]
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_random_signs(activations: Tensor, rows: int, seed: int = 0) -> Tensor:
    """Rows [rows, K] in which channel k is +-activations[k]."""
    return activations * (torch.randint(0, 2, (rows, len(activations)), generator=generator(seed)) * 2 - 1)


# --- by arithmetic


@examples
def test_importance_is_weight_times_activation(
    weights: tuple[float, ...], activations: tuple[float, ...], importances: tuple[float, ...], protect: int
) -> None:
    computed = [abs(w) * x for w, x in zip(weights, activations, strict=True)]
    assert computed == pytest.approx(importances)
    assert computed.index(max(computed)) == protect
    # the largest weight is another one: weights alone would protect the wrong channel
    assert max(range(len(weights)), key=lambda k: abs(weights[k])) != protect


@pytest.mark.parametrize(("weight", "rounded", "activation", "cost"), [(0.20, 0.10, 20, 2.0), (1.20, 1.10, 0.5, 0.05)])
def test_the_same_rounding_costs_what_the_activation_makes_of_it(
    weight: float, rounded: float, activation: float, cost: float
) -> None:
    assert abs(weight - rounded) == pytest.approx(0.1)
    assert abs(weight * activation - rounded * activation) == pytest.approx(cost)


# --- by the statistics that quantize() collects


@both_kernels
@examples
def test_statistics_rank_the_channels_alike(
    kernels: ModuleType,
    weights: tuple[float, ...],
    activations: tuple[float, ...],
    importances: tuple[float, ...],
    protect: int,
) -> None:
    stats = kernels.ActivationStats(len(weights))
    for batch in with_random_signs(torch.tensor(activations), 60).split(25):  # streamed, the last batch short
        stats.update(batch)
    x_mean = stats.abs_sum() / stats.rows
    salience = x_mean * torch.tensor(weights, dtype=torch.float64).abs()
    assert stats.rows == 60
    torch.testing.assert_close(x_mean, torch.tensor(activations).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(salience, torch.tensor(importances, dtype=torch.float64), rtol=1e-6, atol=0)
    assert int(salience.argmax()) == protect


@both_kernels
def test_second_moment_prices_the_rounding_errors(kernels: ModuleType) -> None:
    """The loss that the search minimizes, e G e^T, is the square of the worked costs: 2.0 and 0.05."""
    stats = kernels.ActivationStats(2)
    stats.update(torch.tensor([[20.0, 0.5]]))
    errors = torch.tensor([[0.10, 0.0], [0.0, 0.10]])
    loss = kernels.quadratic_loss(errors, stats.second_moment())
    assert loss.sqrt().tolist() == pytest.approx([2.0, 0.05])


# --- scaling a column by s and its activation by 1/s


@pytest.mark.parametrize("s", [0.5, 2.0, 4.0])
def test_scaling_is_the_same_function(s: float) -> None:
    weight, x = torch.randn(16, 8, generator=generator(0)), torch.randn(5, 8, generator=generator(1))
    scale = torch.ones(8)
    scale[3] = s
    # s is a power of two, so that nothing is rounded anywhere and the products are the very same numbers
    assert torch.equal((x / scale)[:, None] * (weight * scale), x[:, None] * weight)


def rounding_error(weight: Tensor, s: float, channel: int = 0) -> tuple[Tensor, Tensor]:
    """Error [N] of one column rounded after scaling by s and divided by s again; the rounding step [N] of its rows."""
    scale = torch.ones(weight.shape[1])
    scale[channel] = s
    codes, steps, zeros = reference.quantize_weight(weight, group_size=-1, channel_scale=scale)
    restored = reference.dequantize_weight(codes, steps, zeros, group_size=-1) / scale
    return (restored - weight)[:, channel].abs(), steps[:, 0].float()


# Rounding to a grid of step d errs by at most d/2. The grid is 15 steps long and the step is stored in fp16 (relative
# error 2^-11), so the far end of the range may lie 15 * 2^-11 steps beyond the last grid point.
LARGEST_ERROR_IN_STEPS = 0.5 + 15 * 2.0**-11


@pytest.mark.parametrize("s", [1.0, 1.7, 4.0, 16.0])
@pytest.mark.parametrize("width", [2, 7, 128])
def test_error_is_below_half_a_step_over_s(s: float, width: int) -> None:
    weight = torch.randn(4096, width, generator=generator(width))
    error, step = rounding_error(weight, s)
    assert (error <= LARGEST_ERROR_IN_STEPS * step / s + 1e-6 * weight[:, 0].abs()).all()


ROWS = 20_000
# The error is uniform on [0, step / 2]: its standard deviation is 1/sqrt(3) of its mean. Two means of ROWS values each
# differ from their expected ratio by sqrt(2 / (3 * ROWS)) typically; five times that happens once in a million.
RATIO_TOLERANCE = 5 * math.sqrt(2 / (3 * ROWS))


@pytest.mark.parametrize("s", [2.0, 4.0, 7.0])
def test_error_shrinks_by_s_while_the_range_stays(s: float) -> None:
    """A channel of small weights: scaled by s it stays inside the range of its group, so the step stays what it was."""
    weight = torch.randn(ROWS, 32, generator=generator(0)).clamp(-3, 3)
    weight[:, 1], weight[:, 2] = -3.0, 3.0
    weight[:, 0] = (torch.rand(ROWS, generator=generator(1)) * 2 - 1) * (6 / 15)  # within one step of 0
    plain, step = rounding_error(weight, 1.0)
    scaled, step_scaled = rounding_error(weight, s)
    assert torch.equal(step, step_scaled)
    assert float(scaled.mean() / plain.mean()) == pytest.approx(1 / s, rel=RATIO_TOLERANCE)


@pytest.mark.parametrize("s", [1.5, 2.0, 3.0])
def test_error_shrinks_by_about_s_for_ordinary_weights(s: float) -> None:
    """A channel like the others: scaled, it is now and then the largest of its group and widens the step for all."""
    weight = torch.randn(ROWS, 128, generator=generator(2))
    plain, step = rounding_error(weight, 1.0)
    scaled, step_scaled = rounding_error(weight, s)
    growth = float(step_scaled.mean() / step.mean())
    assert (step_scaled >= step).all()
    assert 1 < growth < 1 + 0.1 * (s - 1)  # measured: 1.01, 1.04, 1.13
    assert float(scaled.mean() / plain.mean()) == pytest.approx(growth / s, rel=RATIO_TOLERANCE)


@both_kernels
def test_too_much_protection_hurts_the_others(kernels: ModuleType) -> None:
    """Along s the loss of a layer with one loud channel falls, then rises: that is why s is searched."""
    weight = torch.randn(64, 64, generator=generator(3))
    loud = torch.ones(64)
    loud[5] = 20.0
    x = torch.randn(512, 64, generator=generator(4)) * loud
    scales = torch.ones(3, 64)
    scales[1, 5], scales[2, 5] = 4.0, 1000.0
    plain, moderate, extreme = kernels.scale_losses(weight, scales, x.T @ x, group_size=-1).tolist()
    assert moderate < plain < extreme


# --- by quantize()


def quantized(weight: Tensor, x: Tensor, method: str) -> tuple[nn.Module, QuantLinear]:
    """A model of one Linear with this weight, quantized on x with one scale a row, and its only layer."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    model = awq_ext.quantize(nn.Sequential(linear), [x], method=method, group_size=-1, progress=False)
    layer = model[0]
    assert isinstance(layer, QuantLinear)
    return model, layer


def chosen_scale(layer: QuantLinear) -> Tensor:
    """s [K]: the layer multiplies its input by 1/s."""
    assert layer.pre_quant_scale is not None
    return 1 / layer.pre_quant_scale


def output_error(layer: QuantLinear, weight: Tensor, x: Tensor) -> float:
    return float((layer(x) - x @ weight.T).square().sum(-1).mean())


@both_backends
@examples
def test_quantize_protects_the_important_weight(
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    weights: tuple[float, ...],
    activations: tuple[float, ...],
    importances: tuple[float, ...],
    protect: int,
) -> None:
    monkeypatch.setenv("AWQ_EXT_BACKEND", backend)
    weight, x = torch.tensor([weights]), with_random_signs(torch.tensor(activations), 256)
    model, awq = quantized(weight, x, "awq")
    _, rtn = quantized(weight, x, "rtn")
    row = model.awq_report["0"]
    # against the channel with the largest weight but a quiet activation
    assert chosen_scale(awq)[protect] > chosen_scale(awq)[1]
    assert row.loss < row.loss_rtn
    assert output_error(awq, weight, x) < output_error(rtn, weight, x)
    unprotected = (rtn.weight - weight)[0, protect].abs()
    assert (awq.weight - weight)[0, protect].abs() < unprotected


@both_backends
def test_quantize_gives_the_loud_channel_the_largest_scale(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQ_EXT_BACKEND", backend)
    weight = torch.randn(32, 64, generator=generator(5))
    loud = torch.ones(64)
    loud[17] = 20.0
    x, unseen = (torch.randn(512, 64, generator=generator(seed)) * loud for seed in (6, 7))
    stats = reference.ActivationStats(64)
    stats.update(x)
    salience = stats.abs_sum() / stats.rows * weight.abs().mean(0)
    model, awq = quantized(weight, x, "awq")
    _, rtn = quantized(weight, x, "rtn")
    scale, row = chosen_scale(awq), model.awq_report["0"]
    assert int(salience.argmax()) == int(scale.argmax()) == 17
    assert scale[17] > 1.5 * scale[torch.arange(64) != 17].max()
    assert 0 < row.alpha < 1
    assert row.loss < row.loss_rtn
    # also on rows that the search did not see
    assert output_error(awq, weight, unseen) < output_error(rtn, weight, unseen)


@both_kernels
def test_loss_over_alpha_is_lowest_inside(kernels: ModuleType) -> None:
    """alpha = 0 protects nothing, alpha = 1 too much: the curve that the first notebook draws."""
    weight = torch.randn(128, 256, generator=generator(0))
    loud = torch.ones(256)
    loud[[30, 101, 200]] = torch.tensor([30.0, 18.0, 12.0])
    x = torch.randn(1024, 256, generator=generator(1)) * loud
    candidates, labels = candidate_scales(x.abs().mean(0), weight_mean([weight], [64]), n_grid=20)
    losses = kernels.scale_losses(weight, candidates, x.T @ x, group_size=64).tolist()
    plain = {label.alpha: loss for label, loss in zip(labels, losses, strict=True) if label.kind == "plain"}
    best = min(plain, key=lambda alpha: plain[alpha])
    assert 0 < best < 1
    assert plain[best] < 0.5 * losses[0]  # candidate 0 is the identity: plain rounding
    assert plain[1.0] > losses[0]
