"""The refining of scales and codes by coordinate descent, after rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import SCALE_RANGE
from .sizes import expand_groups, group_length


def damped_moment(second_moment: Tensor, channel_scale: Tensor, damping: float) -> Tensor:
    """Compute H = diag(1/s) second_moment diag(1/s) + damping * its diagonal: fp32 [K, K].

    A channel that no input enters gets so little that the others decide on the scale of its group.
    """
    h = second_moment / (channel_scale[:, None] * channel_scale)
    own = h.diagonal()
    unseen = 1e-6 * float(own.double().mean()) or 1.0
    own.copy_(torch.where(own > 0, own * (1 + damping), unseen))
    return h


def refine_quantized(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    second_moment: Tensor,
    group_size: int,
    bits: int = 4,
    damping: float = 1.0,
    rounds: int = 1,
    channel_scale: Tensor | None = None,
    scales_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower e H e^T of every row, e = weight * s - dequantized value, by coordinate descent on scales and codes.

    Takes what :func:`quantize_weight` or :func:`gptq_quantize` returned for the same weight [N, K] and channel_scale s [K];
    H = diag(1/s) second_moment diag(1/s) + damping * its diagonal. In each round every group's scale, then (unless
    ``scales_only``) every channel's code, is set to its best value while all others stay. Scales are rounded to their storage
    type; one whose best value is not within a factor of 2 stays, so none changes its sign. Zeros stay. Channels that no input
    enters keep the nearest code.
    """
    k, g, top = weight.shape[1], group_length(weight.shape[1], group_size), 2**bits - 1
    w = weight.float() if channel_scale is None else weight.float() * channel_scale
    s = torch.ones(k, device=w.device) if channel_scale is None else channel_scale
    h = damped_moment(second_moment, s, damping)
    steps, offsets, codes = scales.float(), zeros.float(), codes.float()
    largest = SCALE_RANGE[scales.dtype][1]
    with torch.autocast(weight.device.type, enabled=False):
        for _ in range(rounds):
            level = codes - expand_groups(offsets, k, group_size)
            error = w - level * expand_groups(steps, k, group_size)
            for i, part in enumerate(slice(a, min(a + g, k)) for a in range(0, k, g)):
                along = (level[:, part] * (error @ h[:, part])).sum(1)
                size = (level[:, part] * (level[:, part] @ h[part, part])).sum(1)
                best = (steps[:, i] + along / size).to(scales.dtype).float()
                old, wanted = steps[:, i].abs(), best * steps[:, i].sign()
                fits = (wanted > 0.5 * old) & (wanted < 2 * old) & (wanted <= largest)
                steps[:, i] = torch.where(fits, best, steps[:, i])
                error[:, part] = w[:, part] - level[:, part] * steps[:, i, None]
            for j in range(0 if scales_only else k):
                step, zero = steps[:, j // g], offsets[:, j // g]
                target = w[:, j] + (error @ h[:, j] - error[:, j] * h[j, j]) / h[j, j]
                codes[:, j] = (torch.round(target / step) + zero).clamp(0, top)
                error[:, j] = w[:, j] - (codes[:, j] - zero) * step
    return codes.to(torch.uint8), steps.to(scales.dtype), zeros
