"""Bootstrap intervals on data whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from awq_ext import Bootstrap, Estimate
from awq_ext.evaluation.bootstrap import Measure, student_quantile

QUICK = Bootstrap(resamples=500)


def measure(values: torch.Tensor, counts: torch.Tensor | None = None, **settings: object) -> Measure:
    return Measure(values.double(), torch.ones(len(values)).double() if counts is None else counts.double(), **settings)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (11, 2.201), (30, 2.042), (10**6, 1.960)]
)
def test_student_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("n", [8, 12, 40])
def test_an_interval_holds_the_truth_as_often_as_it_says(n: int) -> None:
    """400 experiments with a known mean: the share that holds it is 95 % to within 3.7 standard deviations (1.1 % each)."""
    hits = 0
    for experiment in range(400):
        values = 3 + torch.randn(n, generator=torch.Generator().manual_seed(experiment))
        found = Bootstrap(resamples=400, seed=experiment).estimate(measure(values))
        hits += found.low <= 3 <= found.high
    assert 0.91 <= hits / 400 <= 0.99


def test_the_width_is_that_of_the_formula() -> None:
    values = torch.randn(200)
    found = Bootstrap(resamples=4000).estimate(measure(values))
    half = 1.972 * float(values.std()) / math.sqrt(200)  # Student, 199 degrees of freedom
    assert found.value == pytest.approx(float(values.double().mean()))
    # a percentile of 4000 draws is uncertain by 3 %
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)


def test_a_difference_is_paired() -> None:
    """What a window does to both falls out: the spread of the windows is 1, that of the difference 0.01."""
    common = 5 + torch.randn(50)
    one, other = measure(common + 0.05 + 0.01 * torch.randn(50)), measure(common)
    assert QUICK.estimate(one).low < QUICK.estimate(other).value
    found = QUICK.difference(one, other)
    assert not found.within_noise
    assert found.value == pytest.approx(0.05, abs=0.006)
    assert 0.004 < found.high - found.low < 0.008
    back = QUICK.difference(other, one)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low), abs=3e-4)


def test_a_ratio_is_paired() -> None:
    easy_and_hard = torch.linspace(1, 3, 40)
    plain = measure(easy_and_hard, transform=torch.exp)
    worse = measure(easy_and_hard + 0.1, transform=torch.exp)
    found = QUICK.ratio(worse, plain)
    assert (found.value, found.low, found.high) == pytest.approx((math.exp(0.1),) * 3)


def test_a_difference_of_nothing_is_noise() -> None:
    one = measure(torch.randn(30))
    found = QUICK.difference(one, measure(torch.randn(30)))
    assert found.within_noise
    same = QUICK.difference(one, one)
    assert (same.value, same.low, same.high) == (0, 0, 0) and same.within_noise


def test_windows_count_by_their_tokens() -> None:
    """exp of a ratio of sums, as perplexity is, not a mean of ratios."""
    values, counts = torch.tensor([2.0, 30.0]), torch.tensor([1.0, 10.0])
    assert measure(values, counts, transform=torch.exp).value == pytest.approx(math.exp(32 / 11))
    # of two windows drawn: 2, 30/10 or both
    drawn = measure(values, counts).replicates(500, 0)
    assert {round(v, 6) for v in drawn.tolist()} == {2.0, 3.0, round(32 / 11, 6)}


def test_one_window_tells_nothing() -> None:
    found = QUICK.estimate(measure(torch.ones(1)))
    assert found.value == 1 and math.isnan(found.low) and found.within_noise
    assert found.to_dict() == {"value": 1.0, "low": None, "high": None}


def test_large_samples_are_drawn_in_parts() -> None:
    values = torch.randn(100_000)
    found = Bootstrap(resamples=100).estimate(measure(values))
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(100_000), rel=0.5)


def test_a_seed_gives_one_answer() -> None:
    values = measure(torch.randn(20))
    assert QUICK.estimate(values) == QUICK.estimate(values)
    assert Bootstrap(resamples=500, seed=1).estimate(values) != QUICK.estimate(values)


def test_different_windows_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="different windows"):
        QUICK.difference(measure(torch.ones(3)), measure(torch.ones(4)))
    with pytest.raises(ValueError, match="different windows"):
        QUICK.difference(measure(torch.ones(3)), measure(torch.ones(3), torch.tensor([1, 2, 1])))


@pytest.mark.parametrize("settings", [{"confidence": 1}, {"confidence": 0}, {"resamples": 10}, {"resamples": 1e3}])
def test_impossible_settings(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Bootstrap(**settings)


def test_an_estimate_can_be_printed() -> None:
    assert str(Estimate(1.23456, 1.1, 1.4)) == "1.235 [1.1, 1.4]"
