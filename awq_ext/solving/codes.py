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

# Tried in this order; 1.0 first, so that equal losses keep the full range.
CLIP_RATIOS = tuple(1.0 - 0.05 * step for step in range(11))


@dataclass(frozen=True, eq=False)
class RowLosses:
    """Squared output errors of output rows, fp64 [N] each; in ``damped`` the diagonal of the second moment is raised."""

    plain: Tensor
    damped: Tensor

    def at(self, rows: Tensor) -> RowLosses:
        """Select the errors of some rows, by number."""
        return RowLosses(self.plain[rows], self.damped[rows])

    @staticmethod
    def joined(parts: Sequence[RowLosses]) -> RowLosses:
        """Join the errors of several sets of rows."""
        return RowLosses(torch.cat([one.plain for one in parts]), torch.cat([one.damped for one in parts]))


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
) -> RowLosses:
    """Sum each output row's squared error over the calibration rows: e G e^T of its weight error e, in the original space.

    scale fp32 [K]: what the columns were multiplied by before rounding; divisor fp32 [N]: what the rows were divided by.
    """
    parts = (found.qweight, found.scales, found.zeros)
    return RowLosses(
        *kernels.code_losses(
            weight, *parts, second_moment, found.group_size, channel_scale=scale, divisor=divisor, damping=damping
        )
    )


def spread_rows(count: int, wanted: int, device: torch.device) -> Tensor:
    """Return the numbers of ``wanted`` evenly spaced rows out of ``count``; of all rows for 0 or where there are no more."""
    wanted = count if wanted == 0 else min(wanted, count)
    return torch.arange(wanted, device=device) * count // wanted
