"""Losses and searches: errors and sums by our kernels (``csrc/cuda/search.cu``), products with the second moment by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.search import ROWS_AT_ONCE
from ..reference.sizes import group_count, group_length
from .library import expect, run
from .quantize import Grids, dense, unpack_int4, value_error


def _losses(error: Tensor, second_moment: Tensor, diagonal: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Compute e G e^T of every row, and with a diagonal fp32 [K] the sum of e_k^2 times it: fp64 [N] each. All contiguous."""
    n, k = error.shape
    loss = torch.empty(n, dtype=torch.float64, device=error.device)
    own = None if diagonal is None else torch.empty_like(loss)
    with torch.autocast(error.device.type, enabled=False):
        product = error @ second_moment
    run("forms", error, product, error, diagonal, n, k, loss, own)
    return loss, own


def _moment(function: str, second_moment: Tensor, on: Tensor, k: int) -> Tensor:
    expect(function, "second_moment", second_moment, on, (k, k), torch.float32)
    return second_moment.contiguous()


def quadratic_loss(error: Tensor, second_moment: Tensor) -> Tensor:
    """Compute e G e^T of every row as ``reference.quadratic_loss``: error fp32 [N, K] -> fp64 [N]."""
    expect("quadratic_loss", "error", error, error, tuple(error.shape), torch.float32)
    moment = _moment("quadratic_loss", second_moment, error, error.shape[1])
    return _losses(error.detach().contiguous(), moment)[0]


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
    """Compute the squared output errors of a quantized weight's rows as ``reference.code_losses``: fp64 [N], plain and damped."""
    k = weight.shape[1]
    moment = _moment("code_losses", second_moment, weight, k)
    diagonal = moment.diagonal().contiguous() if damping else None
    total = torch.empty(len(weight), dtype=torch.float64, device=weight.device)
    damped = torch.empty_like(total) if damping else total
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        part = codes[rows] if codes.shape[1] == k else unpack_int4(codes[rows], k)
        shared = channel_scale, None if divisor is None else divisor[rows]
        error = value_error("code_losses", part, scales[rows], zeros[rows], group_size, weight[rows].detach(), *shared)
        loss, own = _losses(error, moment, diagonal)
        total[rows] = loss.clamp_min_(0)
        if own is not None:
            damped[rows] = total[rows] + damping * own
    return total, damped


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
    """Compute a Linear's output error for each candidate scale fp32 [C, K] as ``reference.scale_losses``: fp64 [C]."""
    grids = Grids(group_size, bits, symmetric, scale_dtype)
    grids.check("scale_losses", weight, None)
    n, k = weight.shape
    expect("scale_losses", "candidates", candidates, weight, (len(candidates), k), torch.float32)
    moment = _moment("scale_losses", second_moment, weight, k)
    if 0 < max_rows < n:
        weight = weight[torch.arange(max_rows, device=weight.device) * n // max_rows]
    weight = weight.detach().contiguous()
    error = torch.empty(weight.shape, device=weight.device)
    losses = torch.empty(len(candidates), dtype=torch.float64, device=weight.device)
    for i, scale in enumerate(candidates.contiguous()):
        grids.launch(weight, scale, None, error=error)
        losses[i] = _losses(error, moment)[0].sum()
    return losses


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
    """Find the range ratio of each group with the least error as ``reference.search_clip``: fp32 [N, G]."""
    grids = Grids(group_size, bits, symmetric, scale_dtype)
    grids.check("search_clip", weight, channel_scale)
    n, k = weight.shape
    g, groups = group_length(k, group_size), group_count(k, group_size)
    expect("search_clip", "ratios", ratios, weight, (len(ratios),), torch.float32)
    own = _own_blocks(_moment("search_clip", second_moment, weight, k), g, groups)
    weight, channel_scale = weight.detach().contiguous(), dense(channel_scale)
    if channel_scale is None:
        channel_scale = torch.ones(k, device=weight.device)
    error = torch.empty(groups, n, g, device=weight.device)
    best = torch.full((n, groups), float("inf"), dtype=torch.float64, device=weight.device)
    chosen = torch.ones(n, groups, device=weight.device)
    clip = torch.empty_like(chosen)
    for ratio in ratios.contiguous():
        grids.launch(weight, channel_scale, clip.copy_(ratio.expand_as(clip)), error=error, by_group=True)
        with torch.autocast(weight.device.type, enabled=False):
            product = torch.bmm(error, own)
        run("better_range", weight, product, error, n, g, groups, ratio, best, chosen)
    return chosen


def _own_blocks(moment: Tensor, g: int, groups: int) -> Tensor:
    """Copy the diagonal blocks of the groups: fp32 [G, g, g], a short last one padded with 0."""
    blocks = moment.new_zeros(groups, g, g)
    for i in range(groups):
        part = moment[i * g : (i + 1) * g, i * g : (i + 1) * g]
        blocks[i, : len(part), : len(part)] = part
    return blocks
