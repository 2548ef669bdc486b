"""Weights of calibration rows (``importance.py`` finds them): their own, or those of their position in a window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

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
