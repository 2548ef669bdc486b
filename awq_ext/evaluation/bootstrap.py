"""Bootstrap intervals: how far a mean over windows of text could have come out elsewhere, had other windows been drawn."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

_ELEMENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A measured value and its interval; low and high are NaN where one window leaves nothing to compare."""

    value: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """For a difference: whether the interval holds zero, or is not known."""
        return not (self.low > 0 or self.high < 0)

    def to_dict(self) -> dict[str, float | None]:
        """Plain values, ready for JSON (None for what is not a number)."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Measure:
    """A mean over everything scored, transformed: transform(sum of totals / sum of counts).

    totals, counts: fp64 [n], one of each for a window; what is resampled are windows, since the tokens of one depend on each
    other. better: "lower" or "higher".
    """

    totals: Tensor
    counts: Tensor
    transform: Callable[[Tensor], Tensor] = lambda mean: mean
    better: str = "lower"

    @property
    def value(self) -> float:
        """The value over all windows."""
        return float(self.transform(self.totals.sum() / self.counts.sum()))

    def replicates(self, resamples: int, seed: int) -> Tensor:
        """Compute the value over windows drawn with replacement, fp64 [resamples]; one seed draws the same windows for all."""
        n = len(self.totals)
        generator = torch.Generator().manual_seed(seed)
        values = []
        step = max(1, _ELEMENTS_AT_ONCE // n)
        for start in range(0, resamples, step):
            drawn = torch.randint(n, (min(step, resamples - start), n), generator=generator)
            values.append(self.totals[drawn].sum(1) / self.counts[drawn].sum(1))
        return self.transform(torch.cat(values))


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: from ``resamples`` random draws (``seed``), of which they hold the share ``confidence``."""

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence!r}: a number between 0 and 1 is needed, such as 0.95")
        if not isinstance(self.resamples, int) or self.resamples < 100:
            raise ValueError(f"resamples={self.resamples!r}: an int of at least 100 is needed")

    def estimate(self, measure: Measure) -> Estimate:
        """Return the measure's value and interval."""
        return Estimate(measure.value, *self._interval(lambda: measure.replicates(self.resamples, self.seed), measure))

    def difference(self, one: Measure, other: Measure) -> Estimate:
        """Subtract ``other``, paired: both are scored on the same windows, so what a window adds to both cancels.

        Raises ValueError when they were not.
        """
        return self._paired(one, other, operator.sub)

    def ratio(self, one: Measure, other: Measure) -> Estimate:
        """Divide by ``other``, paired like :meth:`difference`."""
        return self._paired(one, other, operator.truediv)

    def _paired(self, one: Measure, other: Measure, operation: Callable[[Any, Any], Any]) -> Estimate:
        if one.counts.shape != other.counts.shape or not torch.equal(one.counts, other.counts):
            raise ValueError(
                f"the two were scored on different windows ({len(one.counts)} and {len(other.counts)}, or other lengths): "
                "evaluate both on the same samples"
            )

        def replicates() -> Tensor:
            return operation(one.replicates(self.resamples, self.seed), other.replicates(self.resamples, self.seed))

        return Estimate(operation(one.value, other.value), *self._interval(replicates, one))

    def _interval(self, replicates: Callable[[], Tensor], measure: Measure) -> tuple[float, float]:
        n = len(measure.totals)
        if n < 2:
            return math.nan, math.nan
        # A bootstrap of n windows spreads too little by sqrt((n - 1) / n), and its tails are normal where Student's are
        # due: the percentiles are moved outwards by as much (Hesterberg 2015, "What teachers should know about the
        # bootstrap", expanded percentile interval).
        tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_quantile((1 + self.confidence) / 2, n - 1))
        low, high = torch.quantile(replicates(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dict(vars(self))


def student_quantile(probability: float, freedom: int) -> float:
    """Compute a quantile of Student's t distribution: exact for 1 and 2 degrees of freedom, else the Cornish-Fisher expansion.

    Its first four terms (Abramowitz & Stegun 26.7.5) are within 2 % at the 97.5 % point from 3 degrees of freedom on.
    """
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) * math.sqrt(2 / (4 * probability * (1 - probability)))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
