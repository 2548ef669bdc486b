"""QuantizedWeight: the codes of one weight with their scales and zeros, on the way from solving to layers and to files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels.reference import group_count


def row_bytes(in_features: int, bits: int) -> int:
    """Count the bytes of a row of codes: two codes a byte for 4 bits, otherwise one."""
    return (in_features + 1) // 2 if bits == 4 else in_features


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Codes, scales and zeros of a weight, in rows as in the state_dict of ``QuantLinear``.

    W[n, k] = (code[n, k] - zeros[n, k // g]) * scales[n, k // g].

    qweight uint8: for 4 bits two codes a byte, [N, ceil(K/2)], the even channel in the low nibble; for other widths one code a
    byte, [N, K]. scales fp16, bf16 or fp32 [N, G]; zeros uint8 [N, G]; group_size -1 for one group a row.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    in_features: int
    group_size: int
    bits: int = field(default=4, kw_only=True)

    @classmethod
    def of_codes(cls, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bits: int = 4) -> QuantizedWeight:
        """Pack codes uint8 [N, K], scales and zeros [N, G], as the quantizing kernels return them."""
        qweight = kernels.pack_int4(codes) if bits == 4 else codes
        return QuantizedWeight(qweight, scales, zeros, codes.shape[1], group_size, bits=bits)

    @property
    def out_features(self) -> int:
        """Output rows of the weight, N."""
        return self.qweight.shape[0]

    @property
    def groups(self) -> int:
        """Groups per row, G, the short last one included."""
        return group_count(self.in_features, self.group_size)

    def codes(self) -> Tensor:
        """Unpack the codes: uint8 [N, K]."""
        return kernels.unpack_int4(self.qweight, self.in_features) if self.bits == 4 else self.qweight

    def dequantize(self, channel_scale: Tensor | None = None, divisor: Tensor | None = None) -> Tensor:
        """Dequantize to fp32 [N, K], then divide columns by ``channel_scale`` [K] and multiply rows by ``divisor`` [N]."""
        weight = kernels.dequantize_weight(self.codes(), self.scales.float(), self.zeros, self.group_size)
        if channel_scale is not None:
            weight.div_(channel_scale)
        return weight if divisor is None else weight.mul_(divisor[:, None])

    def rows(self, index: Any) -> QuantizedWeight:
        """Select some output rows, by a slice or a Tensor of their numbers."""
        parts = (self.qweight[index], self.scales[index], self.zeros[index])
        return QuantizedWeight(*parts, self.in_features, self.group_size, bits=self.bits)

    @staticmethod
    def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Join the rows of several weights that are alike in all else."""
        tensors = zip(*((one.qweight, one.scales, one.zeros) for one in parts), strict=True)
        one = parts[0]
        # autocast would convert the scales, and refuses fp16 on CPUs
        with torch.autocast(one.scales.device.type, enabled=False):
            joined = [torch.cat(list(same)) for same in tensors]
        return QuantizedWeight(*joined, one.in_features, one.group_size, bits=one.bits)
