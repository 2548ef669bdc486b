"""Weighting: statistics of inputs in which rows count by weights (``importance.py`` finds them): their own, or their position's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..forwards.calls import Call


class Weights(Protocol):
    """Where the rows of a block's inputs get their weights from while batches run through it."""

    def begin(self, call: Call) -> None:
        """Before a batch runs through a block, which reads few of all names."""

    def following(self, name: str, x: Tensor) -> Tensor | None:
        """Those of the next input x [..., K] of a Linear: fp32 [rows]; None where they are not known: all count alike then."""


class RowWeights:
    """The weights of the rows that come to some Linears, batch by batch: 1 on average over those that count."""

    def __init__(self, rows: Sequence[Mapping[str, list[Tensor]]], calls: Sequence[Call]) -> None:
        self._rows = {id(call): mine for call, mine in zip(calls, rows, strict=True)}
        self._calls = calls  # keeps the ids theirs
        self._now: Mapping[str, list[Tensor]] = {}
        self._left: dict[str, Iterator[Tensor]] = {}

    def begin(self, call: Call) -> None:
        """As :class:`Weights` says."""
        self._now, self._left = self._rows[id(call)], {}

    def following(self, name: str, x: Tensor) -> Tensor | None:
        """As :class:`Weights` says: None where other rows came than when they were found."""
        if name not in self._left:
            self._left[name] = iter(self._now.get(name, ()))
        found = next(self._left[name], None)
        return found if found is not None and found.numel() * x.shape[-1] == x.numel() else None


class PositionWeights:
    """Weights of rows by their position in a window (dimension -2 of an input): one to a stretch, 1 on average over rows."""

    def __init__(self, stretches: Mapping[str, Tensor]) -> None:
        self._stretches = stretches  # fp32 [stretches], by name of the first Linear that reads an input
        self._call = Call()

    def begin(self, call: Call) -> None:
        """As :class:`Weights` says."""
        self._call = call

    def following(self, name: str, x: Tensor) -> Tensor | None:
        """As :class:`Weights` says: None for inputs without a position, that is of fewer than three dimensions."""
        weights = self._stretches.get(name)
        if weights is None or x.dim() < 3:
            return None
        mask = self._call.row_mask(x)
        kept = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask.cpu()
        # windows longer than those weighed end as these do
        return weights[stretches_of(kept).clamp_max(len(weights) - 1)].flatten()


def stretches_of(kept: Tensor) -> Tensor:
    """Numbers of the stretches that rows lie in: int64 like ``kept`` [..., T], of which False do not count as positions.

    Position 0, 1 and 2, 3 to 6, 7 to 14 and so on: the first tokens of a window, which all later ones read, differ most.
    """
    positions = (kept.long().cumsum(-1) - 1).clamp_min(0)
    return torch.frexp((positions + 1).double()).exponent.long() - 1


class WeightedStats:
    """``ActivationStats`` of which each row counts by a weight w: G = sum of w x x^T, sum of w x; sum of sqrt(w) |x|.

    Weights are divided by their mean once all rows are in: what is made of G, of the sum and of the number of rows (the second
    moment around the mean) holds for no other.
    """

    def __init__(self, stats: Any) -> None:
        self._stats = stats
        self._sum = torch.zeros_like(stats.sum())
        self._total = 0.0
        self._second_moment: Tensor | None = None

    def update(self, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add the rows of x [..., K], but for those where ``mask`` is False; weights fp32 [rows], None: all 1."""
        assert self._second_moment is None, "no rows can be added once the second moment was read"
        rows = x.detach().reshape(-1, x.shape[-1])
        weights = None if weights is None else weights.to(rows.device)
        if mask is not None:
            kept = mask.reshape(-1).to(rows.device)
            rows, weights = rows[kept], None if weights is None else weights[kept]
        if weights is None:
            self._stats.update(rows)
            self._sum += rows.double().sum(0)
            self._total += len(rows)
            return
        self._stats.update(rows.float() * weights.sqrt()[:, None])
        self._sum += weights.double() @ rows.double()
        self._total += float(weights.double().sum())

    @property
    def _share(self) -> float:
        return self.rows / self._total if self._total > 0 else 1.0

    @property
    def rows(self) -> int:
        """Rows counted."""
        return int(self._stats.rows)

    def sum(self) -> Tensor:
        """Sum over rows of w x: fp64 [K]."""
        return self._sum * self._share

    def abs_sum(self) -> Tensor:
        """Sum over rows of sqrt(w) |x|: fp64 [K]."""
        return self._stats.abs_sum() * self._share**0.5

    def second_moment(self) -> Tensor:
        """Sum over rows of w x x^T: fp32 [K, K]."""
        if self._second_moment is None:
            # in its place: it is the largest thing here
            self._second_moment = self._stats.second_moment().mul_(self._share)
        return self._second_moment
