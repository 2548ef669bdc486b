"""Rounding to nearest, and the packing of two codes in a byte (``csrc/drivers/quantize.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from .sizes import expand_groups, in_groups

# The smallest and the largest scale of each storage type.
SCALE_RANGE = {
    torch.float16: (2.0**-24, 65504.0),
    torch.bfloat16: (2.0**-126, torch.finfo(torch.bfloat16).max),
}


def quantize_weight(
    weight: Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    channel_scale: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight to nearest, group by group: ``w ~ (code - zero) * scale``.

    weight [N, K] fp32/bf16/fp16; channel_scale [K] fp32 multiplies the columns first (in fp32); clip [N, G] fp32 in
    (0, 1] shrinks the range of each group. Returns codes uint8 [N, K], scales ``scale_dtype`` [N, G], zeros uint8 [N, G].

    asymmetric: lo = clip*min(0, min w), hi = clip*max(0, max w), scale = (hi - lo) / (2^bits - 1),
    zero = clamp(round(-lo / scale)). symmetric: zero = 2^(bits - 1), which has one code more below it than above. The weight of
    largest magnitude gets code 0: |scale| = clip*max|w| / 2^(bits - 1), and the scale is negative where that weight is positive.
    Where weights of both signs have that magnitude, the scale is positive.
    The scale is rounded to its storage type *before* codes are computed, so a search sees the values that later run. Rounding is
    half to even. A group whose weights are all equal is stored exactly (up to the storage type): scale = |w|, code = zero +- 1.
    """
    w = weight.float()
    if channel_scale is not None:
        w = w * channel_scale
    top = 2**bits - 1
    grouped = in_groups(w, group_size)
    ratio = torch.ones_like(grouped[..., 0]) if clip is None else clip
    lo = grouped.amin(-1).clamp(max=0) * ratio
    hi = grouped.amax(-1).clamp(min=0) * ratio
    smallest, largest = SCALE_RANGE[scale_dtype]
    middle = 2 ** (bits - 1)
    step = torch.maximum(-lo, hi) / middle if symmetric else (hi - lo) / top
    # min == max over the real (unpadded) channels; a padded group is compared against its own first channel
    first = grouped[..., :1]
    inside = expand_groups(torch.arange(grouped.shape[1], device=w.device), w.shape[1], group_size)
    constant = torch.ones_like(lo, dtype=torch.bool)
    differs = w != first[..., 0].gather(1, inside.expand(w.shape[0], -1))
    constant = ~torch.zeros_like(lo).index_add_(1, inside, differs.float()).bool() & (first[..., 0] != 0)
    step = torch.where(constant, first[..., 0].abs(), step).clamp(smallest, largest)
    if symmetric:
        step = torch.where((hi > -lo) & ~constant, -step, step)
    scales = step.to(scale_dtype)
    step = scales.float()
    if symmetric:
        zeros = torch.full_like(step, middle)
    else:
        zeros = torch.where(constant, (first[..., 0] < 0).float(), torch.round(-lo / step)).clamp(0, top)
    per_channel = lambda v: expand_groups(v, w.shape[1], group_size)  # noqa: E731
    codes = (torch.round(w / per_channel(step)) + per_channel(zeros)).clamp(0, top)
    return codes.to(torch.uint8), scales, zeros.to(torch.uint8)


def dequantize_weight(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """Compute (code - zero) * scale in fp32: [N, K]."""
    k = codes.shape[1]
    return (codes.float() - expand_groups(zeros.float(), k, group_size)) * expand_groups(scales.float(), k, group_size)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes below 16, uint8 [N, K] -> [N, ceil(K / 2)]: even channel in the low nibble, odd in the high one, padded with 0."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_int4(packed: Tensor, in_features: int) -> Tensor:
    """Undo pack_int4: uint8 [N, ceil(K / 2)] -> uint8 [N, K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :in_features].contiguous()
