"""Input channels: streaming means of |x|, their salience, and how alike two rankings of them are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reporting.report import TAIL_PLACES

TOP_SHARE = 0.01
# Rows of a weight that are summed at a time.
_ROWS = 256


@dataclass(frozen=True)
class Agreement:
    """How alike the channels of one layer are on two texts.

    overlap: the share of the top 1 % of channels by salience that are the same. correlation: Spearman's, of the salience of all.
    """

    overlap: float
    correlation: float


class ChannelMeans:
    """Streaming mean |x| of each channel, like ``ActivationStats`` but without the second moment, which takes most of the time.

    It also keeps what is needed to tell how sure the means are. That goes by batches, since the rows of one batch depend on each
    other.
    """

    def __init__(self, in_features: int, device: torch.device | None = None) -> None:
        self.rows = 0
        self.batches = 0
        self.sums = torch.zeros(2, in_features, dtype=torch.float64, device=device)  # of even and of odd batches
        self.half_rows = [0, 0]
        # sums over batches: of their sums squared, of these times their rows, of their rows squared
        self.squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.products = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.row_squares = 0
        self.snapshots: list[tuple[int, Tensor]] = []

    def update(self, x: Tensor, mask: Tensor | None = None, weights: None = None) -> None:
        """Add the rows [..., K], but for those where the bool mask [...] is False."""
        x = x.detach().flatten(0, -2)
        total = (x if mask is None else x[mask.flatten()]).abs().sum(0, dtype=torch.float32).double()
        count = x.shape[0] if mask is None else int(mask.sum())
        half = self.batches % 2
        self.sums[half] += total
        self.half_rows[half] += count
        self.squares += total.square()
        self.products += total * count
        self.row_squares += count**2
        self.rows += count
        self.batches += 1
        if self.batches.bit_count() == 1:  # 1, 2, 4, ...
            self.snapshots.append((self.rows, self.x_mean()))

    def abs_sum(self) -> Tensor:
        """Sum of |x|: fp64 [K]."""
        return self.sums.sum(0)

    def x_mean(self) -> Tensor:
        """Mean |x|: fp32 [K]."""
        return (self.abs_sum() / max(self.rows, 1)).float()

    def halves(self) -> tuple[Tensor, Tensor] | None:
        """Return the means of even and of odd batches; None for a single batch."""
        if min(self.half_rows) == 0:
            return None
        return tuple((total / rows).float() for total, rows in zip(self.sums, self.half_rows, strict=True))

    def relative_error(self) -> Tensor | None:
        """Estimate the standard error of x_mean, a ratio of sums over batches, over x_mean: fp64 [K]; None for a single batch."""
        if self.batches < 2 or self.rows == 0:
            return None
        mean = self.abs_sum() / self.rows
        spread = self.squares - 2 * mean * self.products + mean.square() * self.row_squares
        error = (spread.clamp_min(0) * self.batches / (self.batches - 1)).sqrt() / self.rows
        return error / mean.clamp_min(torch.finfo(torch.float64).tiny)


def top_count(channels: int) -> int:
    """Return how many channels are the top 1 %: at least one."""
    return max(1, round(TOP_SHARE * channels))


def channel_salience(x_mean: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Multiply x_mean [K] by the mean |weight| of each channel over the Linears [N_i, K] that read it: fp32 [K]."""
    # a few rows at a time: copies of whole weights would be the peak of a block's memory
    total = sum(rows.abs().sum(0, dtype=torch.float32) for weight in weights for rows in weight.split(_ROWS))
    return x_mean * total / sum(len(weight) for weight in weights)


def tail(salience: Tensor) -> list[float]:
    """Return the ranked salience [K] at TAIL_PLACES, in multiples of its mean."""
    ranked = salience.sort(descending=True).values / salience.mean().clamp_min(torch.finfo(torch.float32).tiny)
    places = torch.tensor(TAIL_PLACES, dtype=torch.float64).mul(len(ranked) - 1).round().long()
    return [round(value, 5) for value in ranked[places.to(ranked.device)].tolist()]


def top_share(salience: Tensor) -> float:
    """Return the part of all salience [K] that the top 1 % of the channels hold."""
    top = salience.topk(top_count(len(salience))).values
    return float(top.sum() / salience.sum().clamp_min(torch.finfo(torch.float32).tiny))


def agreement(one: Tensor, other: Tensor) -> Agreement:
    """Compare two saliences fp32 [K] by the overlap of the top 1 % and by Spearman's rank correlation."""
    count = top_count(len(one))
    shared = set(one.topk(count).indices.tolist()) & set(other.topk(count).indices.tolist())
    return Agreement(len(shared) / count, spearman(one, other))


def spearman(one: Tensor, other: Tensor) -> float:
    """Return the correlation of ranks, where equal values share the mean of theirs; 1 if both are constant, 0 if one is."""
    ranks = torch.stack([_ranks(one), _ranks(other)])
    ranks -= ranks.mean(1, keepdim=True)
    norms = ranks.norm(dim=1)
    if not norms.all():
        return float(not norms.any())
    return float(ranks[0] @ ranks[1] / norms.prod())


def _ranks(values: Tensor) -> Tensor:
    """Return fp64 ranks from 1 on, with ties averaged."""
    _, inverse, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]
