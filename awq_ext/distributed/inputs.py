"""What arrives at the inputs of blocks, sent to the process that adds it up."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ..calibration.statistics import Rows
from .parcel import pack, unpack


class InputRecord:
    """The rows that one batch brought to the inputs of one block, call by call."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, Rows]] = []

    def take(self, name: str, rows: Rows) -> None:
        """Remember rows that arrived at an input. They are copied: what comes next may work in place."""
        copied = rows.x.detach().clone(memory_format=torch.contiguous_format)
        self._seen.append((name, Rows(copied, rows.mask, rows.weights, rows.seen)))

    def packed(self, including_padding: Collection[str]) -> Tensor:
        """Make a parcel of them and forget them. including_padding: the Linears whose rows included padding so far."""
        tensors: dict[str, Tensor] = {}
        for number, (_, rows) in enumerate(self._seen):
            parts = {"x": rows.x, "mask": rows.mask, "weights": rows.weights}
            tensors |= {f"{number} {kind}": one for kind, one in parts.items() if one is not None}
        told = {"seen": [(name, rows.seen) for name, rows in self._seen], "padded": list(including_padding)}
        self._seen = []
        return pack(tensors, told)


def unpacked(parcel: Tensor, device: torch.device) -> tuple[Iterator[tuple[str, Rows]], list[str]]:
    """Return the rows of a parcel, on ``device``, in the order of their calls, and the Linears whose rows included padding."""
    tensors, told = unpack(parcel)

    def rows() -> Iterator[tuple[str, Rows]]:
        for number, (name, seen) in enumerate(told["seen"]):
            x, mask, weights = (tensors.get(f"{number} {kind}") for kind in ("x", "mask", "weights"))
            yield name, Rows(x.to(device), *(None if one is None else one.to(device) for one in (mask, weights)), seen)

    return rows(), told["padded"]
