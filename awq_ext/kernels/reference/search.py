"""Squared output errors of a weight, of codes and of candidate scales; and the search for clipped ranges."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import dequantize_weight, quantize_weight, unpack_int4
from .sizes import group_count, group_length

ROWS_AT_ONCE = 2048  # of a weight, so that little memory is needed


def quadratic_loss(error: Tensor, second_moment: Tensor) -> Tensor:
    """Compute e G e^T of every row: error fp32 [N, K], second_moment G fp32 [K, K] symmetric -> fp64 [N].

    With G = X^T X this is the squared output error, summed over the calibration rows.
    """
    # autocast would round both factors of a product to 16 bits
    with torch.autocast(error.device.type, enabled=False):
        return ((error @ second_moment).double() * error.double()).sum(1)


def code_losses(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    second_moment: Tensor,
    group_size: int,
    channel_scale: Tensor | None = None,
    divisor: Tensor | None = None,
    damping: float = 0.0,
    ranking: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the squared output errors of a quantized weight's rows, plain and with G's diagonal raised: fp64 [N] each.

    e = (code - zero) * scale / channel_scale * divisor - weight. The plain error is e G e^T, or 0 where rounding makes that
    negative; the other adds damping * sum of e_k^2 G_kk to it. weight [N, K]; codes uint8 [N, K], or [N, ceil(K/2)] packed by
    :func:`pack_int4`; channel_scale fp32 [K]: what columns were multiplied by before rounding; divisor fp32 [N]: what rows were
    divided by. ranking: sums over rows will be compared, for which other kernels may round both factors to bf16.
    """
    k, plain, own = weight.shape[1], [], []
    diagonal = second_moment.diagonal().double()
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        unpacked = codes[rows] if codes.shape[1] == k else unpack_int4(codes[rows], k)
        error = dequantize_weight(unpacked, scales[rows], zeros[rows], group_size)
        if channel_scale is not None:
            error /= channel_scale
        if divisor is not None:
            error *= divisor[rows, None]
        error -= weight[rows]
        plain.append(quadratic_loss(error, second_moment).clamp_min_(0))
        if damping:
            own.append(error.double().square_() @ diagonal)
    total = torch.cat(plain) if plain else diagonal.new_zeros(0)
    return total, total + damping * torch.cat(own) if own else total


def scale_losses(
    weight: Tensor,
    candidates: Tensor,
    second_moment: Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    max_rows: int = 0,
) -> Tensor:
    """Compute a Linear's output error for each candidate s of its input scale: ||(Q(W diag s) diag(1/s) - W) X^T||^2.

    weight [N, K]; candidates fp32 [C, K], all > 0; second_moment fp32 [K, K] = X^T X. Returns fp64 [C].
    max_rows > 0 evaluates that many evenly spaced rows (n = floor(i * N / max_rows)) instead of all N.
    """
    if 0 < max_rows < weight.shape[0]:
        weight = weight[torch.arange(max_rows, device=weight.device) * weight.shape[0] // max_rows]
    losses = []
    for s in candidates:
        parts = quantize_weight(weight, group_size, bits, symmetric, scale_dtype, channel_scale=s)
        error = dequantize_weight(*parts, group_size) / s - weight.float()
        losses.append(quadratic_loss(error, second_moment).sum())
    return torch.stack(losses)


def search_clip(
    weight: Tensor,
    second_moment: Tensor,
    ratios: Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    channel_scale: Tensor | None = None,
) -> Tensor:
    """Find the range ratio of each group with the least e_g G_gg e_g^T, e_g the error in the group: fp32 [N, G].

    G_gg is the diagonal block of second_moment that belongs to the group. Errors are taken in the original space: (Q(W diag s)
    diag(1/s) - W). ratios fp32 [R], tried in order; the first of equal losses wins, so put 1.0 first.
    """
    n, k = weight.shape
    g = group_length(k, group_size)
    s = torch.ones(k, device=weight.device) if channel_scale is None else channel_scale
    best = torch.full((n, group_count(k, group_size)), float("inf"), dtype=torch.float64, device=weight.device)
    chosen = torch.ones_like(best, dtype=torch.float32)
    for ratio in ratios.tolist():
        clip = torch.full_like(chosen, ratio)
        parts = quantize_weight(weight, group_size, bits, symmetric, scale_dtype, s, clip)
        error = dequantize_weight(*parts, group_size) / s - weight.float()
        loss = torch.stack(
            [quadratic_loss(error[:, a : a + g], second_moment[a : a + g, a : a + g]) for a in range(0, k, g)], dim=1
        )
        better = loss < best
        best = torch.where(better, loss, best)
        chosen = torch.where(better, clip, chosen)
    return chosen
