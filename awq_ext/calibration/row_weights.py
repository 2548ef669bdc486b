"""Weights of calibration rows (``importance.py`` finds them): one for each row, or one for its position in a window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..forwards.calls import Call


class Weights(Protocol):
    """Source of the weights of a block's input rows while batches run through the block."""

    def begin(self, call: Call) -> None:
        """Start over for a batch that is about to run through a block."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights, by names that :func:`weights_of` understands."""

    def following(self, name: str, x: Tensor) -> Tensor | None:
        """Return the weights of the next input x [..., K] of a Linear: fp32 [rows]; None if unknown: all rows count alike then."""


class RowWeights:
    """Weights of the rows that reach some Linears, batch by batch: powers of 2, about 1 on average over the rows that count."""

    def __init__(self, rows: Sequence[Mapping[str, list[Tensor]]], calls: Sequence[Call]) -> None:
        self._rows = {id(call): mine for call, mine in zip(calls, rows, strict=True)}
        self._calls = calls  # kept alive, so that no other object gets one of their ids
        self._now: Mapping[str, list[Tensor]] = {}
        self._left: dict[str, Iterator[Tensor]] = {}

    def begin(self, call: Call) -> None:
        """As :class:`Weights` says."""
        self._now, self._left = self._rows[id(call)], {}

    def tensors(self) -> dict[str, Tensor]:
        """As :class:`Weights` says."""
        rows = [self._rows[id(call)] for call in self._calls]
        return {
            f"{i} {k} {n}": x for i, mine in enumerate(rows) for n, seen in mine.items() for k, x in enumerate(seen)
        }

    def following(self, name: str, x: Tensor) -> Tensor | None:
        """As :class:`Weights` says: None where x has another number of rows than when its weights were found."""
        if name not in self._left:
            self._left[name] = iter(self._now.get(name, ()))
        found = next(self._left[name], None)
        return found if found is not None and found.numel() * x.shape[-1] == x.numel() else None


class PositionWeights:
    """Weights of rows by position in a window (dimension -2 of an input), one for each stretch: powers of 2, about 1 on average."""

    def __init__(self, stretches: Mapping[str, Tensor]) -> None:
        self._stretches = stretches  # fp32 [stretches], by name of the first Linear that reads an input
        self._call = Call()

    def begin(self, call: Call) -> None:
        """As :class:`Weights` says."""
        self._call = call

    def tensors(self) -> dict[str, Tensor]:
        """As :class:`Weights` says."""
        return dict(self._stretches)

    def following(self, name: str, x: Tensor) -> Tensor | None:
        """As :class:`Weights` says: None for inputs without a position, that is of fewer than three dimensions."""
        weights = self._stretches.get(name)
        if weights is None or x.dim() < 3:
            return None
        mask = self._call.row_mask(x)
        kept = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask.cpu()
        # positions past the windows that had a backward get the weight of their last stretch
        return weights[stretches_of(kept).clamp_max(len(weights) - 1)].flatten()


def told(weights: Weights) -> tuple[dict[str, Tensor], bool]:
    """Return what :func:`weights_of` makes such weights of: their tensors, and whether they are by position."""
    return weights.tensors(), isinstance(weights, PositionWeights)


def weights_of(tensors: Mapping[str, Tensor], by_position: bool, calls: Sequence[Call]) -> Weights:
    """Make weights of what :func:`told` returned of them, for the same calls."""
    if by_position:
        return PositionWeights(tensors)
    rows: list[dict[str, list[Tensor]]] = [{} for _ in calls]
    for key, tensor in tensors.items():  # in the order in which they were listed
        index, _, name = key.split(" ", 2)
        rows[int(index)].setdefault(name, []).append(tensor)
    return RowWeights(rows, calls)


def stretches_of(kept: Tensor) -> Tensor:
    """Number the stretch of positions that each row lies in: int64 like ``kept`` [..., T]; rows not kept take no position.

    Stretches are position 0, 1 and 2, 3 to 6, 7 to 14 and so on: short at the beginning of a window, whose tokens differ most
    because all later ones read them.
    """
    positions = (kept.long().cumsum(-1) - 1).clamp_min(0)
    return torch.frexp((positions + 1).double()).exponent.long() - 1
