"""Quantized weights while a block is solved: rounding to nearest, the search of clipped ranges, and squared output errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..config import AwqConfig
from ..layers.quantized_weight import QuantizedWeight
from ..undo import interrupt

# Tried in this order; 1.0 first, so that equal losses keep the full range.
CLIP_RATIOS = tuple(1.0 - 0.05 * step for step in range(11))
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True, eq=False)
class RowLosses:
    """Squared output errors of rows: fp64 [N], ``plain`` and as they are with the moment's diagonal raised by ``damping``."""

    plain: Tensor
    damped: Tensor

    def at(self, rows: Tensor) -> RowLosses:
        """Those of some rows, by number."""
        return RowLosses(self.plain[rows], self.damped[rows])


def round_to_nearest(
    weight: Tensor, settings: AwqConfig, scale: Tensor | None = None, clip: Tensor | None = None
) -> QuantizedWeight:
    """Round ``weight`` [N, K] times ``scale`` [K] to codes, ranges shrunk by ``clip`` [N, G]."""
    interrupt.check()
    parts = kernels.quantize_weight(weight, channel_scale=scale, clip=clip, **settings.quantizer)
    return QuantizedWeight.of_codes(*parts, settings.group_size, settings.bits)


def search_clip(weight: Tensor, second_moment: Tensor, settings: AwqConfig, scale: Tensor | None) -> Tensor:
    """Search the range ratio of every weight group: fp32 [N, G]."""
    interrupt.check()
    ratios = torch.tensor(CLIP_RATIOS, dtype=torch.float32, device=weight.device)
    return kernels.search_clip(weight, second_moment, ratios, channel_scale=scale, **settings.quantizer)


def row_losses(
    weight: Tensor,
    found: QuantizedWeight,
    second_moment: Tensor,
    scale: Tensor | None = None,
    divisor: Tensor | None = None,
    damping: float = 0.0,
) -> RowLosses:
    """Sum the squared output errors of each row over the calibration rows: e G e^T of every row e of E, in the original space.

    scale fp32 [K] and divisor fp32 [N]: what the columns were multiplied and the rows divided by before rounding.
    """
    plain, own = [], []
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        part = None if divisor is None else divisor[rows]
        error = found.rows(rows).dequantize(scale, part).sub_(weight[rows])
        # below 0 only by rounding, where nothing is lost or inputs hardly vary
        plain.append(kernels.quadratic_loss(error, second_moment).clamp_min_(0))
        if damping:
            own.append(error.square_() @ second_moment.diagonal())
    total = torch.cat(plain) if plain else torch.zeros(0, dtype=torch.float64, device=weight.device)
    return RowLosses(total, total + damping * torch.cat(own).double() if own else total)


def spread_rows(count: int, wanted: int, device: torch.device) -> Tensor:
    """Number ``wanted`` evenly spaced rows below ``count``; all of them for 0 or where there are no more."""
    wanted = count if wanted == 0 else min(wanted, count)
    return torch.arange(wanted, device=device) * count // wanted
