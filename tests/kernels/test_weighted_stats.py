"""ActivationStats of rows that count by weights, at every instruction set that this processor has."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from awq_ext import _C
from awq_ext.kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 2.0**-24  # relative error of one fp32 operation
KERNELS = pytest.mark.parametrize("kernels", [_C, reference], ids=["compiled", "reference"])

# every test here, on every instruction set
pytestmark = pytest.mark.usefixtures("isa")


def fed(x: Tensor, weights: Tensor, mask: Tensor | None, kernels: ModuleType = _C) -> object:
    """Statistics of x in two unequal parts."""
    stats, cut = kernels.ActivationStats(x.shape[1]), len(x) // 3
    for part in (slice(cut), slice(cut, None)):
        stats.update(x[part], None if mask is None else mask[part], weights[part])
    return stats


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (37, 64), (1900, 33), (1, 300)])
@pytest.mark.parametrize("masked", [False, True])
def test_weighted_stats(dtype: torch.dtype, shape: tuple[int, int], masked: bool) -> None:
    """Bit for bit the statistics of x * sqrt(w) in fp32, but for the sum, whose products are exact."""
    x, weights = torch.randn(shape).to(dtype), torch.rand(shape[0]) * 3
    mask = torch.rand(shape[0]) > 0.3 if masked else None
    stats, plain, cut = fed(x, weights, mask), _C.ActivationStats(shape[1]), shape[0] // 3
    scaled = x.float() * weights.sqrt()[:, None]
    for part in (slice(cut), slice(cut, None)):
        plain.update(scaled[part], None if mask is None else mask[part])
    kept = slice(None) if mask is None else mask
    total, weight = torch.zeros(shape[1]).double(), 0.0
    for row, w in zip(x[kept].double(), weights[kept].double(), strict=True):
        total += w * row
        weight += float(w)
    share = plain.rows / weight if weight else 1.0
    assert stats.rows == plain.rows
    assert torch.equal(stats.sum(), total * share)
    assert torch.equal(stats.abs_sum(), plain.abs_sum() * share**0.5)
    assert torch.equal(stats.second_moment(), plain.second_moment() * share)


@KERNELS
def test_weighted_stats_against_exact_sums(kernels: ModuleType) -> None:
    x, weights = torch.randn(70, 33).bfloat16(), torch.rand(70) * 3
    stats, x, w = fed(x, weights, None, kernels), x.double(), weights.double()
    w = w / w.mean()
    n = len(x)
    # fp64: n products and sums, a share
    torch.testing.assert_close(stats.sum(), w @ x, rtol=0, atol=2.0**-52 * (n + 4) * float((w @ x.abs()).max()))
    # a root is off by up to one unit in its last place, 2 EPS, its product by half of one; all of one sign
    torch.testing.assert_close(stats.abs_sum(), w.sqrt() @ x.abs(), rtol=3 * EPS, atol=0)
    # 3 EPS for each of both factors, then a product and n sums, and the share and its product
    bound = (x.abs().T * w) @ x.abs() * (EPS * (n + 10))
    assert torch.all((stats.second_moment().double() - (x.T * w) @ x).abs() <= bound)


@pytest.mark.parametrize("shape", [(1, 1), (37, 64), (2500, 33), (70, 300)])
def test_powers_of_2_multiply_bf16_rows_exactly(shape: tuple[int, int]) -> None:
    """Such weights may be multiplied into one of the two factors: what was left or right of it must not mix."""
    x, weights = torch.randn(shape).bfloat16(), 2.0 ** torch.randint(-13, 5, (shape[0],))
    x[:, 0] *= 100
    weights[::7] = 0 if shape[0] > 1 else 2
    stats, exact, w = fed(x, weights, None), x.double(), weights.double()
    w /= w.mean()
    bound = (exact.abs().T * w) @ exact.abs() * (EPS * (len(x) + 10))
    assert torch.all((stats.second_moment().double() - (exact.T * w) @ exact).abs() <= bound)
    assert torch.equal(stats.second_moment(), stats.second_moment().T)
    one = _C.ActivationStats(shape[1])
    one.update(x[:1], weights=torch.full((1,), 4.0))
    assert torch.equal(one.second_moment(), x[:1].float().T @ x[:1].float())


@KERNELS
def test_rows_with_and_without_weights(kernels: ModuleType) -> None:
    x, weights = torch.randn(20, 16), torch.rand(20) + 0.5
    stats, ones = kernels.ActivationStats(16), kernels.ActivationStats(16)
    stats.update(x)
    before = [part.clone() for part in (stats.sum(), stats.abs_sum(), stats.second_moment())]
    stats.update(x, weights=weights)
    ones.update(x, weights=torch.ones(20))
    for mine, expected in zip((ones.sum(), ones.abs_sum(), ones.second_moment()), before, strict=True):
        assert torch.equal(mine, expected)
    ones.update(x, weights=weights)
    assert torch.equal(ones.sum(), stats.sum())
    assert torch.equal(ones.second_moment(), stats.second_moment())
    w = torch.cat([torch.ones(20), weights]).double()
    w /= w.mean()
    twice = torch.cat([x, x]).double()
    torch.testing.assert_close(stats.second_moment().double(), (twice.T * w) @ twice, rtol=0, atol=40 * 50 * EPS * 20)


@KERNELS
def test_looking_at_weighted_stats_in_between(kernels: ModuleType) -> None:
    x, weights = torch.randn(3, 40, 16), torch.rand(3, 40)
    seen, unseen = kernels.ActivationStats(16), kernels.ActivationStats(16)
    for rows, w in zip(x, weights, strict=True):
        for stats in (seen, unseen):
            stats.update(rows, weights=w)
        seen.second_moment()
        assert torch.equal(seen.second_moment(), seen.second_moment())
    # the share is multiplied in and out again: four roundings a look more, of sums of 120 terms of either sign
    magnitude = (x.abs().flatten(0, 1).T * (weights.flatten() / weights.mean())) @ x.abs().flatten(0, 1)
    assert torch.all((seen.second_moment() - unseen.second_moment()).abs() <= magnitude * (EPS * (2 * 4 + 2 + 2 * 120)))


@KERNELS
def test_rows_of_no_weight(kernels: ModuleType) -> None:
    stats = kernels.ActivationStats(3)
    stats.update(torch.ones(2, 3), weights=torch.zeros(2))
    assert stats.rows == 2
    assert not stats.second_moment().any()
    assert not stats.sum().any()
    assert not stats.abs_sum().any()


@KERNELS
def test_wrong_weights_leave_statistics_as_they_were(kernels: ModuleType) -> None:
    x, stats = torch.randn(4, 8), kernels.ActivationStats(8)
    stats.update(x)
    before = [stats.rows, stats.sum().clone(), stats.second_moment().clone()]
    wrong = {
        "4 elements": torch.ones(3),
        "finite": torch.tensor([1.0, 1.0, float("nan"), 1.0]),
        "from 0": torch.tensor([1.0, -1.0, 1.0, 1.0]),
    }
    for message, weights in wrong.items():
        with pytest.raises(ValueError, match=rf"'weights'.*{message}"):
            stats.update(x, None, weights)
    with pytest.raises(TypeError, match="'weights'"):
        stats.update(x, None, torch.ones(4).double())
    assert stats.rows == before[0]
    assert torch.equal(stats.sum(), before[1])
    assert torch.equal(stats.second_moment(), before[2])
    # what the mask leaves out has no weight to be wrong
    stats.update(x, torch.tensor([True, False, True, True]), wrong["from 0"])
    assert stats.rows == 7
