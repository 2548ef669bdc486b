"""The second moment around the mean: what is left of it where inputs hardly vary, and that it stays positive semidefinite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from awq_ext import _C
from awq_ext.calibration import centred
from awq_ext.calibration.centred import KEPT
from awq_ext.calibration.statistics import InputStatistics
from awq_ext.kernels import reference

EPS = 2.0**-24  # relative error of one fp32 operation


@pytest.mark.parametrize("kernels", [_C, reference], ids=["compiled", "reference"])
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (7, 33), (700, 40), (2100, 20)])
def test_the_moment_around_the_mean(kernels: Any, rows: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(rows, k) + 5 * torch.randn(k)
    stats = kernels.ActivationStats(k)
    stats.update(x)
    found = InputStatistics(stats).guide(around_mean=True)
    exact = x.double()
    mean = exact.mean(0)
    expected = (exact - mean).T @ (exact - mean) + KEPT * rows * torch.outer(mean, mean)
    # G itself, rows + 4 units of its sum of magnitudes, and one rounding to fp32
    allowed = (rows + 5) * EPS * (exact.abs().T @ exact.abs())
    assert ((found.double() - expected).abs() <= allowed).all()
    assert torch.equal(found, found.T)
    assert (found.diagonal() >= 0).all()
    monkeypatch.setattr(centred, "_AT_ONCE", 3 * k)
    assert torch.equal(InputStatistics(stats).guide(around_mean=True), found)


@pytest.mark.parametrize("kernels", [_C, reference], ids=["compiled", "reference"])
def test_rows_that_are_all_the_same_leave_a_moment_that_is_none_below_zero(kernels: Any) -> None:
    row = torch.randn(64) * torch.randn(64).exp()
    stats = kernels.ActivationStats(64)
    for _ in range(30):
        stats.update(row.expand(700, 64))
    found = InputStatistics(stats).guide(around_mean=True).double()
    assert (found.diagonal() >= 0).all()
    size = (stats.second_moment().diagonal().double()).sqrt()
    relative = found / size / size[:, None]
    assert relative.abs().max() <= 2 * KEPT
    assert torch.linalg.eigvalsh(relative).min() >= -KEPT
