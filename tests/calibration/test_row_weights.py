"""Where rows get their weights from, and statistics in which they count by them."""

from __future__ import annotations

import torch

from awq_ext import kernels
from awq_ext.calibration.centred import KEPT
from awq_ext.calibration.row_weights import PositionWeights, stretches_of
from awq_ext.calibration.statistics import InputStatistics
from awq_ext.forwards.calls import Call


def test_the_moment_around_the_mean_is_one() -> None:
    """Whatever weights sum up to: rows that differ little from their mean leave little."""
    x = 5 + 0.1 * torch.randn(50, 16)
    given = InputStatistics(kernels.activation_stats(16))
    given.stats.update(x, None, torch.linspace(2, 9, 50))
    w = torch.linspace(2, 9, 50).double()
    w /= w.mean()
    mean = w @ x.double() / 50
    assert torch.allclose(given.mean, mean)
    spread = x.double() - mean
    # fp32 sums of 50 numbers near 25, and the share of the mean's part that stays
    expected = (spread.T * w) @ spread + KEPT * 50 * torch.outer(mean, mean)
    assert torch.allclose(given.guide(around_mean=True).double(), expected, atol=50 * 50 * 25 * 2**-24)


def test_stretches_double() -> None:
    every = stretches_of(torch.ones(2, 40, dtype=torch.bool))
    assert every[0].tolist() == every[1].tolist() == [0] + 2 * [1] + 4 * [2] + 8 * [3] + 16 * [4] + 9 * [5]
    long = stretches_of(torch.ones(1, 1 << 17, dtype=torch.bool))[0]
    assert [int((long < i).sum()) for i in range(1, 18)] == [(1 << i) - 1 for i in range(1, 18)]


def test_padding_takes_no_positions() -> None:
    left = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1]]) != 0
    assert stretches_of(left)[0, 3:].tolist() == [0, 1, 1, 2]
    assert stretches_of(left)[1][left[1]].tolist() == [0, 1, 1, 2, 2]


def test_weights_by_position() -> None:
    weights = PositionWeights({"a": torch.tensor([8.0, 2.0, 0.5])})
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
    weights.begin(Call((), {"attention_mask": mask}))
    x = torch.randn(1, 10, 4)
    # what lies beyond the windows weighed counts as their end
    assert weights.following("a", x)[2:].tolist() == [8.0, 2.0, 2.0] + 5 * [0.5]
    assert weights.following("b", x) is None
    weights.begin(Call())
    assert weights.following("a", x).tolist() == [8.0, 2.0, 2.0] + 7 * [0.5]
    assert weights.following("a", x[0]) is None  # no telling where a window begins
