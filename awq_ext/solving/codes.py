"""Quantized weights while a block is solved: codes, their losses, and the search of clipped ranges."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..config import AwqConfig
from ..undo import interrupt

# Tried in this order; 1.0 first, so that equal losses keep the full range.
CLIP_RATIOS = tuple(1.0 - 0.05 * step for step in range(11))
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class RowLosses:
    """Squared output errors of rows: fp64 [N], ``plain`` and as they are with the moment's diagonal raised by ``damping``."""

    plain: Tensor
    damped: Tensor

    def at(self, rows: Tensor) -> RowLosses:
        """Those of some rows, by number."""
        return RowLosses(self.plain[rows], self.damped[rows])


@dataclass(frozen=True)
class Codes:
    """One quantized weight: stored codes uint8, scales [N, G], zeros uint8 [N, G].

    stored: [N, K], or packed two to a byte [N, ceil(K/2)] for 4 bits: a block's codes are kept while it is solved.
    """

    stored: Tensor
    scales: Tensor
    zeros: Tensor
    in_features: int
    packed: bool

    @classmethod
    def store(cls, kernels: ModuleType, parts: tuple[Tensor, Tensor, Tensor], bits: int) -> Codes:
        """From codes uint8 [N, K], scales and zeros [N, G], as the quantizing kernels return them."""
        codes, scales, zeros = parts
        packed = bits == 4
        return cls(kernels.pack_int4(codes) if packed else codes, scales, zeros, codes.shape[1], packed)

    def unpacked(self, kernels: ModuleType) -> Tensor:
        """Codes uint8 [N, K]."""
        return kernels.unpack_int4(self.stored, self.in_features) if self.packed else self.stored

    def dequantize(
        self,
        kernels: ModuleType,
        group_size: int,
        channel_scale: Tensor | None = None,
        divisor: Tensor | None = None,
    ) -> Tensor:
        """fp32 weight in the original space: columns divided by ``channel_scale`` [K], rows multiplied by ``divisor`` [N]."""
        weight = kernels.dequantize_weight(self.unpacked(kernels), self.scales, self.zeros, group_size)
        if channel_scale is not None:
            weight.div_(channel_scale)
        return weight if divisor is None else weight.mul_(divisor[:, None])

    def rows(self, index: slice | Tensor) -> Codes:
        """The codes of some output rows."""
        return Codes(self.stored[index], self.scales[index], self.zeros[index], self.in_features, self.packed)


def round_to_nearest(
    kernels: ModuleType, weight: Tensor, config: AwqConfig, scale: Tensor | None = None, clip: Tensor | None = None
) -> Codes:
    """Round ``weight`` * scale to codes, ranges shrunk by ``clip`` [N, G]."""
    interrupt.check()
    parts = kernels.quantize_weight(weight, channel_scale=scale, clip=clip, **config.quantizer)
    return Codes.store(kernels, parts, config.bits)


def search_clip(
    kernels: ModuleType, weight: Tensor, second_moment: Tensor, config: AwqConfig, scale: Tensor | None
) -> Tensor:
    """Range ratio of every weight group: fp32 [N, G]."""
    interrupt.check()
    ratios = torch.tensor(CLIP_RATIOS, dtype=torch.float32, device=weight.device)
    return kernels.search_clip(weight, second_moment, ratios, channel_scale=scale, **config.quantizer)


def row_losses(
    kernels: ModuleType,
    weight: Tensor,
    codes: Codes,
    scale: Tensor | None,
    second_moment: Tensor,
    group_size: int,
    divisor: Tensor | None = None,
    damping: float = 0.0,
) -> RowLosses:
    """e G e^T of every row e of E, in the original space: the squared output errors summed over the calibration rows.

    scale fp32 [K] and divisor fp32 [N]: what the columns were multiplied and the rows divided by before rounding.
    """
    plain, own = [], []
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        part = None if divisor is None else divisor[rows]
        error = codes.rows(rows).dequantize(kernels, group_size, scale, part).sub_(weight[rows])
        # below 0 only by rounding, where nothing is lost or inputs hardly vary
        plain.append(kernels.quadratic_loss(error, second_moment).clamp_min_(0))
        if damping:
            own.append(error.square_() @ second_moment.diagonal())
    total = torch.cat(plain) if plain else torch.zeros(0, dtype=torch.float64, device=weight.device)
    return RowLosses(total, total + damping * torch.cat(own).double() if own else total)


def spread_rows(count: int, wanted: int, device: torch.device) -> Tensor:
    """``wanted`` evenly spaced row numbers below ``count``; all of them for 0 or where there are no more."""
    wanted = count if wanted == 0 else min(wanted, count)
    return torch.arange(wanted, device=device) * count // wanted
