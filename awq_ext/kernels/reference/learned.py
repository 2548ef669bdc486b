"""Codes of a Linear while gradients move them: positions between codes, of which the nearest code is taken."""

from __future__ import annotations

import torch
from torch import Tensor

from .sizes import expand_groups, in_groups

# A position can move by half a code to each side of where it began.
REACH = 0.5


def learned_weight(
    start: Tensor,
    moved: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
    channel_scale: Tensor | None = None,
    divisor: Tensor | None = None,
) -> Tensor:
    """Dequantize the codes nearest to ``start + moved``, both fp32 [N, K] in codes: ``dtype`` [N, K].

    scales and zeros: fp32 [N, G]. The weight is divided by ``channel_scale`` fp32 [K] and multiplied by ``divisor`` fp32 [N].
    """
    k = start.shape[1]
    codes = (start + moved).round_().clamp_(0, 2**bits - 1)
    weight = codes.sub_(expand_groups(zeros, k, group_size)).mul_(expand_groups(scales, k, group_size))
    if channel_scale is not None:
        weight.div_(channel_scale)
    if divisor is not None:
        weight.mul_(divisor[:, None])
    return weight.to(dtype)


def move_learned(
    start: Tensor,
    moved: Tensor,
    thetas: Tensor,
    scales: Tensor,
    zeros: Tensor,
    gradient: Tensor,
    rate: float,
    theta_rate: float,
    group_size: int,
    bits: int,
    channel_scale: Tensor | None = None,
    divisor: Tensor | None = None,
) -> None:
    """Step against the signs of the gradients of positions and of ``thetas``, in place. NaN has the sign 0.

    gradient [N, K]: that of what :func:`learned_weight` returns for the same arguments. thetas fp32 [N, G]: logarithms of what
    scales are multiplied by. The derivative of the weight by theta is the weight; that by a position has the sign of the scale, as
    ``channel_scale`` and ``divisor`` are positive. A position stays within ``REACH`` of where it began.
    """
    weight = learned_weight(start, moved, scales, zeros, group_size, bits, torch.float32, channel_scale, divisor)
    slope = gradient.float()
    thetas.sub_(_sign(in_groups(slope * weight, group_size).sum(-1)), alpha=theta_rate)
    signs = expand_groups(_sign(scales), start.shape[1], group_size)
    moved.sub_(_sign(slope).mul_(signs), alpha=rate).clamp_(-REACH, REACH)


def _sign(x: Tensor) -> Tensor:
    return (x > 0).float().sub_((x < 0).float())
