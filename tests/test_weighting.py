"""Statistics in which rows count by weights, against the formulas."""

from __future__ import annotations

import pytest
import torch

import awq_ext
from awq_ext.weighting import WeightedStats


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
