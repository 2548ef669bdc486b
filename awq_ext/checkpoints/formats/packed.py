"""PackedLinear: one quantized Linear between two layouts, and the checks that every layout shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import kernels_for
from ...kernels.reference import group_count

SYMMETRIC_ZERO = 8  # the middle code: what formats without zeros subtract


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written, or does not fit the model; the model is as it was."""


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """W[n, k] = (code[n, k] - zeros[n, k // g]) * scales[n, k // g], in rows, as ``QuantLinear`` has them in its state_dict.

    qweight uint8 [N, ceil(K/2)], even channel in the low nibble; scales fp16, bf16 or fp32 [N, G]; zeros uint8 [N, G], 0..15;
    group_size -1 for one group a row; bias [N]; pre_quant_scale fp32 [K] multiplies the input.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    in_features: int
    group_size: int
    bias: Tensor | None = None
    pre_quant_scale: Tensor | None = None

    @property
    def out_features(self) -> int:
        """N."""
        return self.qweight.shape[0]

    @property
    def groups(self) -> int:
        """G, the short last group included."""
        return group_count(self.in_features, self.group_size)

    @property
    def symmetric(self) -> bool:
        """Whether every zero is the middle code."""
        return bool((self.zeros == SYMMETRIC_ZERO).all())

    def codes(self) -> Tensor:
        """uint8 [N, K], 0..15."""
        return kernels_for(self.qweight.device).unpack_int4(self.qweight, self.in_features)

    def dequantize(self) -> Tensor:
        """The weight, without pre_quant_scale: fp32 [N, K]."""
        kernels = kernels_for(self.qweight.device)
        return kernels.dequantize_weight(self.codes(), self.scales.float(), self.zeros, self.group_size)


def pack_rows(codes: Tensor) -> Tensor:
    """uint8 [N, K] codes below 16 -> uint8 [N, ceil(K/2)], even channel in the low nibble."""
    return kernels_for(codes.device).pack_int4(codes)


def expect(name: str, tensor: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
    """CheckpointError unless the tensor has this shape and one of these dtypes."""
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, this layout needs {tuple(shape)}")
    if tensor.dtype not in dtypes:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(f"{name} has dtype {tensor.dtype}, this layout needs {known}")


def exactly(scales: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``scales`` in another dtype, or None where a bit would be lost."""
    cast = scales.to(dtype)
    return cast if torch.equal(cast.to(torch.float64), scales.to(torch.float64)) else None
