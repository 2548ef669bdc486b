"""Rare channels: quiet on the calibration rows but for a few, perhaps loud on others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import awq_ext
from awq_ext import kernels
from awq_ext.calibration.rare import ENOUGH, lack_of_rows, raised
from awq_ext.calibration.statistics import InputStatistics

K = 48


def given(x: Tensor, weights: Tensor | None = None) -> InputStatistics:
    one = InputStatistics(kernels.activation_stats(x.shape[1], x.device))
    one.stats.update(x, weights=weights)
    return one


def lack_of(x: Tensor) -> Tensor | None:
    return lack_of_rows(len(x), x.double().abs().sum(0), x.square().sum(0))


def test_a_channel_lacks_the_rows_that_do_not_drive_it() -> None:
    x = torch.randn(1200, 5)
    x[:, 0] = 0
    x[3:, 1] = 0  # three rows, of different size
    x[8:, 2], x[:8, 2] = 0, 0.5  # eight of one size
    x[:, 3] *= 1e-6  # small on every row
    lack = lack_of(x)
    assert lack[[0, 3, 4]].tolist() == [0, 0, 0]
    assert 1 - 3 / ENOUGH <= lack[1] < 1
    assert lack[2] == pytest.approx(1 - 8 / ENOUGH)
    assert lack_of(x[:, [0, 3, 4]]) is None


def test_of_few_rows_a_share_is_enough() -> None:
    x = torch.randn(96, K)
    x[2:, 0], x[1:, 1], x[:2, 0] = 0, 0, 1
    lack = lack_of(x)
    assert lack[:2].tolist() == pytest.approx([1 - 2 / 3, 1 - 1 / 3])
    assert not lack[2:].any()
    assert lack_of(x[:20]) is None
    assert lack_of(x[:0]) is None


def test_squares_that_vanish_in_fp32_lack_all_rows() -> None:
    x = torch.randn(400, 3)
    x[:, 0] = 1e-30
    assert lack_of(x).tolist() == [1, 0, 0]


def test_entries_are_raised_towards_their_median() -> None:
    lack = torch.tensor([0.0, 0.5, 0.75, 0.75, 0.75])
    moment = torch.tensor([0.0, 1.0, 4.0, 6.0, 90.0]).diag() + 0.5
    found = raised(moment - 0.5, lack)
    assert found.diagonal().tolist() == [0, 2, 4, 6, 90]
    assert torch.equal(found, found.diagonal().diag())
    assert not raised(torch.zeros(2, 2), torch.ones(2)).any()


@pytest.mark.parametrize("around_mean", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_only_what_rests_on_few_rows_is_raised(around_mean: bool, weighted: bool) -> None:
    x = torch.randn(1200, K)
    weights = torch.randint(0, 3, (len(x),)).float().exp2() if weighted else None
    steady = given(x, weights)
    assert steady.guide() is steady.guide()
    assert torch.equal(steady.guide(), steady.second_moment)
    x[2:, 0] = 0
    one = given(x, weights)
    before, plain = one.second_moment.clone(), steady.guide(around_mean)
    found = one.guide(around_mean)
    assert torch.equal(one.second_moment, before), "the statistics themselves stay as they are"
    assert found[0, 0] > 0.5 * found.diagonal().median() > before[0, 0]
    assert torch.equal(found[1:, 1:], plain[1:, 1:])


class Hidden(nn.Module):
    """An MLP of one block whose first hidden unit reacts to its own input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(K, 2 * K), nn.GELU(), nn.Linear(2 * K, K))])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
def test_a_unit_that_calibration_hardly_saw_is_not_given_the_errors_of_the_others(method: str) -> None:
    torch.manual_seed(0)
    model = Hidden().eval()
    up = model.layers[0][0]
    with torch.no_grad():
        up.weight[0], up.bias[0] = 0, -9
        up.weight[0, 0] = 3
    quiet = torch.randn(600, K)
    quiet[:, 0] = 0
    quiet[0, 0] = 1.5  # the one row from which the unit's correlations with all others come
    loud = torch.randn(600, K)
    loud[:, 0] = 6
    expected = model(loud).detach()
    error = {}
    for name in ("rtn", method):
        copy = Hidden().eval()
        copy.load_state_dict(model.state_dict())
        settings = {"group_size": 16, "only": ("*.2",), "packed": False, "progress": False, "blocks": ["layers.0"]}
        awq_ext.quantize(copy, [quiet], method=name, **settings)
        error[name] = float((copy(loud).detach() - expected).square().mean())
    assert error[method] < 1.5 * error["rtn"]
