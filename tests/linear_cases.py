"""Weights in the compute layout, and how far two results of a Linear may be apart."""

from __future__ import annotations

import torch
from torch import Tensor

from awq_ext import _C
from awq_ext.kernels import reference

Parts = tuple[Tensor, Tensor, Tensor]
# The arguments of quant_linear, but for compute_dtype.
NAMES = (
    "x",
    "tiles",
    "scales",
    "zeros",
    "bias",
    "pre_quant_scale",
    "in_features",
    "out_features",
    "group_size",
    "bits",
)


def tiled(
    n: int, k: int, group_size: int, bits: int, scale_dtype: torch.dtype = torch.float16, symmetric: bool = False
) -> Parts:
    """A random weight in the compute layout. Of a symmetric one, scales have both signs."""
    codes, scales, zeros = _C.quantize_weight(torch.randn(n, k), group_size, bits, symmetric, scale_dtype)
    rows = _C.pack_int4(codes) if bits == 4 else codes
    return _C.tile_codes(rows, k, group_size, bits), reference.tile_scales(scales), reference.tile_zeros(zeros, bits)


def bound(x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor | None) -> Tensor:
    """How far two results may be apart, fp32 [M, N].

    Products of x and code - zero are exact (8 + 11 bits) or rounded once; they are added up in fp32, at most K times, on both sides
    in different orders, and multiplied by scales: 2 (K + 6) u32 of the sum of magnitudes, with u32 = 2^-23 because tensor cores may
    cut off instead of rounding. x * pre and the result are rounded to x's dtype, half an epsilon each, on either side.
    """
    scaled = x.float().abs() if pre is None else x.float().abs() * pre
    size = scaled @ weight.abs().T
    eps = 0.0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    off = size * (2 * (x.shape[1] + 6) * 2.0**-23 + (eps / 2 if pre is not None else 0.0))
    largest = size + off + (0.0 if bias is None else bias.float().abs())
    return off + largest * (eps + 2.0**-23) + (6e-8 if x.dtype == torch.float16 else 0.0)  # fp16: subnormals
