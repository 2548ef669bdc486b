"""Padding among the rows of experts: those of tokens that attention_mask marks 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..forwards.calls import Call
from ..forwards.lockstep import Stop
from ..survey.expert_rows import ExpertHooks, row_hashes, row_tensors
from ..survey.mixtures import Mixture


class ExpertPadding(ExpertHooks):
    """Finds the masks of the rows of experts, batch by batch.

    An expert is called with rows chosen by a router, and no mask fits them by its shape. They are recognized by their bits among
    the rows of tensors that a mask does fit (what the mixture is called with, the norms' outputs). What the expert computes from
    them has as many rows, in the same order. Nothing is compared in batches without padding.
    """

    def __init__(self, mixtures: Sequence[Mixture]) -> None:
        super().__init__(mixtures)
        self._expert_of = {
            name: (m.owner, m.fused, e)
            for m in mixtures
            for names in m.families.values()
            for e, name in enumerate(names)
        }
        self._call = Call()
        self._padded = False
        # tensors that a mask fits: width, sorted hashes of the rows that count, of the others
        self._sources: list[tuple[int, Tensor, Tensor]] = []
        self._rows: dict[str, Tensor] = {}  # masks of the rows of the call that is running, by Linear
        self._expert_rows: dict[tuple[str, bool, int], Tensor] = {}  # mask of the rows that an expert got last
        self.including_padding: dict[str, None] = {}  # Linears whose padding could not be told from other rows

    def begin(self, stop: Stop) -> None:
        """Note the batch that runs next."""
        self._call = stop.call
        self._padded = bool(self.mixtures) and any((mask == 0).any() for mask in self._call.masks)
        self._sources, self._rows, self._expert_rows = [], {}, {}
        if any(mixture.owner == stop.block.name for mixture in self.mixtures):
            self._see_source(stop.block.name, "", stop.inputs)  # hooks on the block itself do not run

    def row_mask(self, name: str, x: Tensor) -> Tensor | None:
        """Tell which rows of ``x``, the input of the Linear ``name`` (an expert's or not), count; None for all."""
        if name in self._rows:
            return self._rows[name]
        mask = self._call.row_mask(x)
        # one row for each sample is no token, but something made of the whole sample
        no_tokens = (0, *(len(each) for each in self._call.masks))
        if self._padded and mask is None and name in self._expert_of and x.numel() // x.shape[-1] not in no_tokens:
            self.including_padding[name] = None
        return mask

    def _see_source(self, owner: str | None, name: str, value: Any) -> None:
        if owner is not None:
            self._expert_rows = {expert: mask for expert, mask in self._expert_rows.items() if expert[0] != owner}
        for _, tensor in row_tensors(value) if self._padded else ():
            if (mask := self._call.row_mask(tensor)) is not None:
                hashes, counts = row_hashes(tensor), mask.flatten()
                kept, left = hashes[counts].sort().values, hashes[~counts].sort().values
                self._sources.append((tensor.shape[-1], kept, left))

    def _see_rows(self, name: str, x: Tensor | None) -> None:
        expert = self._expert_of[name]
        self._rows.pop(name, None)
        if not self._padded or x is None or x.dim() < 2 or (x.dim() > 2 and self._call.row_mask(x) is not None):
            return
        count = x.numel() // x.shape[-1]
        mask = self._known(row_hashes(x), x.shape[-1])
        if mask is None and expert in self._expert_rows and len(self._expert_rows[expert]) == count:
            mask = self._expert_rows[expert]
        if mask is not None:
            self._expert_rows[expert] = mask
            self._rows[name] = mask.view(x.shape[:-1])

    def _known(self, rows: Tensor, width: int) -> Tensor | None:
        """Find the mask of rows with these hashes; None unless all are rows of one tensor."""
        for k, kept, left in reversed(self._sources):
            if k == width:
                count = _occurrences(kept, rows)
                if bool((count + _occurrences(left, rows) > 0).all()):
                    return _rank(rows) < count
        return None


def warnings_for(names: Sequence[str]) -> list[str]:
    """Warn of Linears whose statistics include padding."""
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [
        f"{names[0]}{more}: which rows of these experts are padding is not seen from attention_mask, so padding counts in their "
        "statistics: calibrate with batches that have none"
    ]


def _occurrences(ordered: Tensor, values: Tensor) -> Tensor:
    """Count how often each of ``values`` is in ``ordered``."""
    return torch.searchsorted(ordered, values, right=True) - torch.searchsorted(ordered, values)


def _rank(values: Tensor) -> Tensor:
    """Count the equal values before each value: of rows of equal bits the first ones are taken for tokens, the rest for padding."""
    order = values.argsort(stable=True)
    ordered = values[order]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(values), device=values.device) - torch.searchsorted(ordered, ordered)
    return rank
