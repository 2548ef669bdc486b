"""Codes while a block is solved: rounding to nearest, the search for clipped ranges, and squared output errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..config import AwqConfig
from ..layers.quantized_weight import QuantizedWeight
from ..undo import interrupt

# By how much a sum of ranking losses over rows may be off, as a share of the loss that independent errors would have, the sum of
# e_k^2 G_kk: more than twice what csrc/drivers/quadratic.h derives for one row. Over many rows most of it averages out.
_RANKING_ERROR = 0.01

# Tried in this order; 1.0 first, so that equal losses keep the full range.
CLIP_RATIOS = tuple(1.0 - 0.05 * step for step in range(11))


@dataclass(frozen=True, eq=False)
class RowLosses:
    """Squared output errors of output rows, fp64 [N] each; in ``damped`` the diagonal of the second moment is raised.

    unsure: their sums over all rows are off by at most its sum.
    """

    plain: Tensor
    damped: Tensor
    unsure: Tensor

    def at(self, rows: Tensor) -> RowLosses:
        """Select the errors of some rows, by number."""
        return RowLosses(self.plain[rows], self.damped[rows], self.unsure[rows])

    @staticmethod
    def joined(parts: Sequence[RowLosses]) -> RowLosses:
        """Join the errors of several sets of rows."""
        columns = zip(*((one.plain, one.damped, one.unsure) for one in parts), strict=True)
        return RowLosses(*(torch.cat(column) for column in columns))


def round_to_nearest(
    weight: Tensor, settings: AwqConfig, scale: Tensor | None = None, clip: Tensor | None = None
) -> QuantizedWeight:
    """Round ``weight`` [N, K] times ``scale`` [K] to codes, ranges shrunk by ``clip`` [N, G]."""
    interrupt.check()
    parts = kernels.quantize_weight(weight, channel_scale=scale, clip=clip, **settings.quantizer)
    return QuantizedWeight.of_codes(*parts, settings.group_size, settings.bits)


def search_clip(weight: Tensor, second_moment: Tensor, settings: AwqConfig, scale: Tensor | None) -> Tensor:
    """Search for the best range ratio of every weight group: fp32 [N, G]."""
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
    ranking: bool = False,
) -> RowLosses:
    """Sum each output row's squared error over the calibration rows: e G e^T of its weight error e, in the original space.

    scale fp32 [K]: what the columns were multiplied by before rounding; divisor fp32 [N]: what the rows were divided by.
    ranking: compute them fast, to compare sums over rows that differ by more than they are ``unsure``.
    """
    parts = (weight, found.qweight, found.scales, found.zeros, second_moment, found.group_size, scale, divisor)
    plain, damped = kernels.code_losses(*parts, damping=damping or float(ranking), ranking=ranking)
    if not ranking:
        return RowLosses(plain, damped, torch.zeros_like(plain))
    return RowLosses(plain, damped, _RANKING_ERROR * (damped - plain) / (damping or 1.0))


def spread_rows(count: int, wanted: int, device: torch.device) -> Tensor:
    """Return the numbers of ``wanted`` evenly spaced rows out of ``count``; of all rows for 0 or where there are no more."""
    wanted = count if wanted == 0 else min(wanted, count)
    return torch.arange(wanted, device=device) * count // wanted
