"""Streaming statistics of the inputs of a Linear (``csrc/cuda/stats.cu``); the second moment is a product of torch's, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import stats as reference
from .library import TYPES, run, value


class ActivationStats(reference.ActivationStats):
    """Statistics as ``reference.ActivationStats``: one pass over the rows for both sums and for the rows that X^T X is made of."""

    def update(self, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add the rows of x [..., K] (fp32/bf16/fp16, any strides); mask bool and weights fp32, >= 0, one for each row."""
        flat = x.detach().reshape(-1, self.in_features)
        flat = (flat if flat.dtype in TYPES else flat.float()).contiguous()
        if mask is not None:
            if mask.numel() != len(flat):
                raise ValueError(
                    f"ActivationStats.update: argument 'mask': expected {len(flat)} elements, one a row, got {mask.numel()}"
                )
            mask = mask.reshape(-1).to(flat.device, torch.bool).contiguous()
        if weights is not None:
            weights = reference.one_a_row(weights, len(flat)).to(flat.device).contiguous()
        count, total = _count(len(flat), mask, weights)
        self._set_applied(1.0)
        if len(flat):
            self._add(flat, mask, weights)
        self.rows += count
        self._total += total
        self._weighted |= weights is not None

    def _add(self, flat: Tensor, mask: Tensor | None, weights: Tensor | None) -> None:
        rows, k = flat.shape
        plain = mask is None and weights is None and flat.dtype == torch.float32
        kept = None if plain else torch.empty(rows, k, device=flat.device)
        parts = torch.empty(2, value("chunks", rows), k, dtype=torch.float64, device=flat.device)
        sizes = TYPES[flat.dtype], rows, k
        run("sum_rows", flat, flat, *sizes, weights, mask, parts, self._sum, self._abs_sum, kept)
        counted = flat if kept is None else kept
        with torch.autocast(flat.device.type, enabled=False):
            self._second_moment.addmm_(counted.T, counted)


def _count(rows: int, mask: Tensor | None, weights: Tensor | None) -> tuple[int, float]:
    """Count the rows that count, and add up their weights. ValueError for weights that are negative or not finite."""
    if weights is None:
        count = rows if mask is None else int(mask.sum())
        return count, float(count)
    counted = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask
    right = weights.isfinite() & (weights >= 0) | ~counted
    count, total, all_right = torch.stack(
        [counted.sum().double(), weights.double()[counted].sum(), right.all().double()]
    ).tolist()
    if not all_right:
        raise ValueError("ActivationStats.update: argument 'weights': expected finite numbers from 0")
    return int(count), total
