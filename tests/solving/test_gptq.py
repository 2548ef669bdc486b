"""Error feedback as the solver uses it: what it gains, when it is dropped, and which power of the scale it gets."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import moment
from torch import Tensor, nn

import awq_ext
from awq_ext import AwqConfig
from awq_ext.kernels import reference
from awq_ext.solving.codes import round_to_nearest, row_losses
from awq_ext.solving.gptq import Quantizer
from awq_ext.solving.scales import STRENGTHS, candidate_scales, weight_mean


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("bits", [2, 4])
def test_less_output_error_than_nearest(backend: None, group_size: int, bits: int) -> None:
    second_moment, weight, scale = moment(120), torch.randn(40, 120), torch.rand(120) + 0.5
    config = AwqConfig(method="gptq", group_size=group_size, bits=bits, packed=False)
    nearest = round_to_nearest(weight, config, scale)
    fed_back = Quantizer(second_moment, scale).gptq(weight, config)
    losses = [float(row_losses(weight, one, second_moment, scale).plain.sum()) for one in (nearest, fed_back)]
    assert losses[1] < 0.8 * losses[0]


def test_a_factor_is_made_once_for_all_linears_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    factor = reference.gptq_factor
    monkeypatch.setattr(reference, "gptq_factor", lambda *args: made.append(args) or factor(*args))
    monkeypatch.setenv("AWQ_EXT_BACKEND", "reference")
    quantizer = Quantizer(moment(20))
    for weight in torch.randn(3, 4, 20):
        quantizer.gptq(weight, AwqConfig(method="gptq"))
    assert len(made) == 1
    quantizer.under(torch.rand(20) + 0.5).gptq(weight, AwqConfig(method="awq+gptq"))
    assert len(made) == 1
    quantizer.gptq(weight, AwqConfig(method="gptq", damping=0.1))
    assert len(made) == 2


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
@pytest.mark.parametrize("clip", [True, False, "auto"])
def test_the_report_says_what_was_used(method: str, clip: bool | str) -> None:
    model, mix = mlp(), torch.randn(64, 64)
    batches = [torch.randn(50, 64) @ mix for _ in range(4)]
    awq_ext.quantize(model, batches, method=method, clip=clip, group_size=16, progress=False)
    for row in model.awq_report.layers:
        assert row.method == method
        assert row.loss < row.loss_rtn
        assert clip is not False or not row.clipped


def test_feedback_is_dropped_where_it_does_not_help() -> None:
    # a single channel has nothing to make up with: feedback gives the codes of rounding to nearest
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8))
    batches = [torch.randn(100, 1) for _ in range(2)]
    result = awq_ext.quantize(copy.deepcopy(model), batches, method="gptq", group_size=16, progress=False)
    rows = result.awq_report.layers
    assert rows[0].method == "rtn"
    assert rows[0].loss <= rows[0].loss_rtn  # its bias takes over what the mean of the input leaves
    assert rows[1].method == "gptq"
    assert rows[1].loss < rows[1].loss_rtn


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 96), nn.Linear(64, 40)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


def fed_back_loss(
    weights: list[Tensor], scale: Tensor, second_moment: Tensor, settings: AwqConfig, refined: bool
) -> float:
    """What the Linears lose together, over all rows."""
    quantizer = Quantizer(second_moment, scale)
    found = [quantizer.gptq(weight, settings, refined=refined).dequantize(scale) for weight in weights]
    return sum(float(reference.quadratic_loss(f - w, second_moment).sum()) for f, w in zip(found, weights, strict=True))


@pytest.mark.parametrize("bits", [3, 4])
def test_the_power_of_the_scale_is_the_one_that_loses_least(bits: int) -> None:
    settings = AwqConfig(
        bits=bits, group_size=16, search_rows=0, clip=False, fold="never", packed=False, bias_correction=False
    )
    powers = set()
    for seed in range(8):
        torch.manual_seed(seed)
        model = TwoHeads()
        x = torch.randn(400, 64) @ (torch.eye(64) + torch.randn(64, 64) / 16) * torch.exp(1.5 * torch.randn(64))
        awq, both = (
            awq_ext.quantize(copy.deepcopy(model), [x], settings, method=method, progress=False).awq_report
            for method in ("awq", "awq+gptq")
        )
        row = both.layers[0]
        assert (row.scale, row.alpha) == (awq.layers[0].scale, awq.layers[0].alpha)
        weights = [model.a.weight.detach(), model.b.weight.detach()]
        w_mean = weight_mean(weights, [16, 16])
        scales, labels = candidate_scales(x.abs().mean(0), w_mean, settings.n_grid)
        scale = scales[[(label.kind, label.alpha) for label in labels].index((row.scale, row.alpha))]
        moment = x.T @ x
        losses = {power: fed_back_loss(weights, scale**power, moment, settings, False) for power in STRENGTHS}
        # fp32 sums in another order
        assert losses[row.power] <= min(losses.values()) * (1 + 1e-4)
        left = fed_back_loss(weights, scale**row.power, moment, settings, True)
        assert sum(one.loss for one in both.layers) * len(x) == pytest.approx(left, rel=1e-3)
        assert {one.power for one in awq.layers} == {1.0}
        powers.add(row.power)
    assert len(powers) > 1
