"""The Linear with weights of 4 or 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import dequantize_weight, unpack_int4
from .sizes import expand_groups, group_length, in_groups
from .tiles import untile_codes, untile_scales, untile_zeros


def quant_weight(
    tiles: Tensor, scales: Tensor, zeros: Tensor, in_features: int, out_features: int, group_size: int, bits: int
) -> Tensor:
    """Dequantize a tiled weight of 4 or 8 bits, (code - zero) * scale: fp32 [N, K]."""
    rows = untile_codes(tiles, out_features, in_features, group_size, bits)
    groups = untile_scales(scales, out_features), untile_zeros(zeros, out_features, bits)
    return dequantize_weight(unpack_int4(rows, in_features) if bits == 4 else rows, *groups, group_size)


def quant_scale_gradient(
    gradient: Tensor,
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor,
    pre_quant_scale: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    bits: int,
) -> Tensor:
    """Compute what ``gradient`` [..., N] of quant_linear's output means for the scales of the weight's groups: fp32 [N, G].

    For each output and group the sum over rows and channels of gradient * (code - zero) * x. Of ``scales`` only the shape counts.
    """
    rows = untile_codes(tiles, out_features, in_features, group_size, bits)
    codes = unpack_int4(rows, in_features) if bits == 4 else rows
    return scale_gradient(gradient, x, codes, untile_zeros(zeros, out_features, bits), group_size, pre_quant_scale)


_ROWS_AT_ONCE = 256


def scale_gradient(
    gradient: Tensor,
    x: Tensor,
    codes: Tensor,
    zeros: Tensor,
    group_size: int,
    pre_quant_scale: Tensor | None = None,
) -> Tensor:
    """Do the same for codes uint8 [N, K] and zeros uint8 [N, G]. The gradient of the weight exists for some rows at a time."""
    given, inputs = gradient.reshape(-1, gradient.shape[-1]).float(), x.reshape(-1, x.shape[-1]).float()
    if pre_quant_scale is not None:
        inputs = inputs * pre_quant_scale
    found = torch.zeros(zeros.shape, dtype=torch.float32, device=zeros.device)
    for part in torch.arange(len(codes), device=codes.device).split(_ROWS_AT_ONCE):
        integers = codes[part].float() - expand_groups(zeros[part].float(), codes.shape[1], group_size)
        found[part] = in_groups((given[:, part].T @ inputs) * integers, group_size).sum(-1)
    return found


RUN_CHANNELS = 256  # the most channels that share a scale of int8 activations


def int8_activations(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round x fp32 [..., K] to q * scale: q int8 [..., K], scale fp32 [..., K] with one value for each run of channels.

    A run is a group, or up to 256 channels of a longer one. scale = max |x| / 127 (at least 2^-126), q = round(x / scale),
    half to even. In a run with a non-finite x the scale is not finite either, and q is 0.
    """
    k = x.shape[-1]
    run = torch.arange(k, device=x.device)
    g = group_length(k, group_size)
    run = run // g * -(-g // RUN_CHANNELS) + run % g // RUN_CHANNELS
    largest = torch.zeros((*x.shape[:-1], int(run[-1]) + 1), device=x.device)
    largest = largest.scatter_reduce(-1, run.expand_as(x), x.abs(), "amax")
    scale = (largest / 127).clamp(min=2.0**-126)[..., run]
    q = torch.where(scale.isfinite(), torch.round(x * (1 / scale)), 0)
    return q.to(torch.int8), scale


def quant_linear(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    pre_quant_scale: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    bits: int,
    compute_dtype: str = "auto",
) -> Tensor:
    """Compute x [..., K] @ W^T + bias: [..., N].

    W of 4 or 8 bits: tiles uint8 [T, S, 16 bits], scales [T, G, 32] and zeros uint8 [T, G, 4 bits].
    pre_quant_scale fp32 [K] multiplies x first (1/s, where the scale s could not be folded). compute_dtype "int8" then rounds x
    to ``int8_activations``. Computed in fp32, returned in x's dtype.
    """
    x32 = x.float() if pre_quant_scale is None else x.float() * pre_quant_scale
    if compute_dtype == "int8":
        q, scale = int8_activations(x32, group_size)
        x32 = q * scale
    weight = quant_weight(tiles, scales, zeros, in_features, out_features, group_size, bits)
    return torch.nn.functional.linear(x32, weight, None if bias is None else bias.float()).to(x.dtype)
