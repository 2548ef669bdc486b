"""Statistics in which rows count by weights, against the formulas."""

from __future__ import annotations

import pytest
import torch

import awq_ext
from awq_ext.calibration.row_weights import PositionWeights, WeightedStats, stretches_of
from awq_ext.calibration.statistics import InputStatistics
from awq_ext.forwards.calls import Call
from awq_ext.solving.bias import KEPT, CentredStats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_sums(dtype: torch.dtype, masked: bool) -> None:
    k = 33
    stats = WeightedStats(awq_ext._C.ActivationStats(k))
    rows, weights = [], []
    for shape in ((2, 7, k), (5, k), (1, 1, k)):
        x = torch.randn(shape).to(dtype)
        w = torch.rand(x.numel() // k) * 3
        mask = torch.rand(x.shape[:-1]) > 0.3 if masked else None
        stats.update(x, mask, w)
        kept = slice(None) if mask is None else mask.flatten()
        rows.append(x.double().view(-1, k)[kept])
        weights.append(w.double()[kept])
    x, w = torch.cat(rows), torch.cat(weights)
    w /= w.mean()
    assert stats.rows == len(x)
    assert torch.allclose(stats.sum(), w @ x)
    # products are rounded to float32 before they are added
    assert torch.allclose(stats.second_moment().double(), (x.T * w) @ x, rtol=1e-5, atol=1e-5)
    assert torch.allclose(stats.abs_sum(), w.sqrt() @ x.abs(), rtol=1e-6)


def test_without_weights_all_rows_count_one() -> None:
    x = torch.randn(20, 16)
    stats, plain = WeightedStats(awq_ext._C.ActivationStats(16)), awq_ext._C.ActivationStats(16)
    for one in (stats, plain):
        one.update(x)
        one.update(x, torch.arange(20) > 5)
    assert stats.rows == plain.rows
    assert torch.equal(stats.second_moment(), plain.second_moment())
    assert torch.equal(stats.abs_sum(), plain.abs_sum())
    assert torch.allclose(stats.sum(), plain.sum())


def test_the_moment_around_the_mean_is_one() -> None:
    """Whatever weights sum up to: rows that differ little from their mean leave little."""
    x = 5 + 0.1 * torch.randn(50, 16)
    stats = WeightedStats(awq_ext._C.ActivationStats(16))
    stats.update(x, None, torch.linspace(2, 9, 50))
    book = InputStatistics(CentredStats(stats), centred=True)
    w = torch.linspace(2, 9, 50).double()
    w /= w.mean()
    mean = w @ x.double() / 50
    assert torch.allclose(book.mean, mean)
    spread = x.double() - mean
    # fp32 sums of 50 numbers near 25, and the share of the mean's part that stays
    expected = (spread.T * w) @ spread + KEPT * 50 * torch.outer(mean, mean)
    assert torch.allclose(book.stats.second_moment().double(), expected, atol=50 * 50 * 25 * 2**-24)


def test_no_rows_after_the_second_moment_was_read() -> None:
    stats = WeightedStats(awq_ext._C.ActivationStats(16))
    stats.update(torch.randn(5, 16), None, torch.rand(5))
    assert torch.equal(stats.second_moment(), stats.second_moment())
    with pytest.raises(AssertionError, match="no rows can be added"):
        stats.update(torch.randn(5, 16))


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
