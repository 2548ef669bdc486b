"""Error feedback and coordinate descent: what goes channel by channel by our kernels (``csrc/cuda/descent.cu``), the rest by torch.

Products are fp32. Channels are rounded in panels of 32: the errors outside a panel come as a product, those inside are told from
lane to lane.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.refine import damped_moment
from ..reference.sizes import group_count, group_length
from .library import TYPES, expect, run
from .quantize import quantize_weight

PANEL = 32  # channels that a launch rounds (descent.cu)
BLOCK = 256  # channels whose share of all earlier errors is one product


class _Rows:
    """A weight that is being rounded: fp32 [N, K] times the channel scale, its codes, steps fp32, zeros and errors."""

    def __init__(
        self, weight: Tensor, channel_scale: Tensor | None, parts: tuple[Tensor, Tensor, Tensor], g: int, bits: int
    ):
        w = weight.detach().float()
        self.weight = (w if channel_scale is None else w * channel_scale).contiguous()
        self.codes, self.scale_dtype = parts[0].contiguous(), parts[1].dtype
        self.steps, self.zeros = parts[1].float().contiguous(), parts[2].contiguous()
        self.n, self.k = weight.shape
        self.group, self.bits = group_length(self.k, g), bits
        self.error = torch.zeros_like(self.weight)

    def round_panel(self, first: int, sums: Tensor, matrix: Tensor, order: Tensor | None = None) -> None:
        """Round the channels at places first .. first + len(sums[0]); matrix fp32 [K, K] holds how errors act on each other."""
        count, within = sums.shape[1], matrix[first:, first:]
        rows = self.weight, order, self.steps, self.zeros, self.n, self.k, self.group
        run(
            "panel", self.weight, sums, within, matrix.stride(0), *rows, first, count, self.bits, self.error, self.codes
        )

    def move_step(self, at: int, h: Tensor) -> None:
        """Set the step of group ``at`` to its best value."""
        part = slice(at * self.group, min((at + 1) * self.group, self.k))
        own = h[part, part]
        levels = torch.empty(self.n, len(own), device=own.device)
        sizes = self.n, self.k, self.group, at
        run("levels", levels, self.codes, self.zeros, *sizes, levels)
        pull, size = self.error @ h[:, part], levels @ own
        grid = self.codes, self.zeros, *sizes, TYPES[self.scale_dtype]
        run("move_step", levels, self.weight, *grid, pull, size, self.steps, self.error)


def gptq_quantize(
    weight: Tensor,
    factor: Tensor,
    order: Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    channel_scale: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize with error feedback as ``reference.gptq_quantize``."""
    parts = quantize_weight(weight, group_size, bits, symmetric, scale_dtype, channel_scale, clip)
    rows = _Rows(weight, channel_scale, parts, group_size, bits)
    k = rows.k
    expect("gptq_quantize", "factor", factor, weight, (k, k), torch.float32)
    expect("gptq_quantize", "order", order, weight, (k,), torch.int64)
    factor, order = (
        (factor if channel_scale is None else factor / channel_scale[order][:, None]).contiguous(),
        order.contiguous(),
    )
    with torch.autocast(weight.device.type, enabled=False):
        for block in range(0, k, BLOCK):
            end = min(block + BLOCK, k)
            earlier = rows.error[:, :block] @ factor[:block, block:end]
            for first in range(block, end, PANEL):
                last = min(first + PANEL, end)
                sums = (
                    earlier[:, first - block : last - block]
                    + rows.error[:, block:first] @ factor[block:first, first:last]
                )
                rows.round_panel(first, sums.contiguous(), factor, order)
    return rows.codes, parts[1], parts[2]


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
    """Lower the errors by descent on scales and codes as ``reference.refine_quantized``."""
    n, k = weight.shape
    groups = group_count(k, group_size)
    expect("refine_quantized", "codes", codes, weight, (n, k), torch.uint8)
    expect("refine_quantized", "scales", scales, weight, (n, groups), torch.float16, torch.bfloat16)
    expect("refine_quantized", "zeros", zeros, weight, (n, groups), torch.uint8)
    expect("refine_quantized", "second_moment", second_moment, weight, (k, k), torch.float32)
    if rounds == 0:
        return codes, scales, zeros
    s = torch.ones(k, device=weight.device) if channel_scale is None else channel_scale
    h = damped_moment(second_moment, s, damping).contiguous()
    rows = _Rows(weight, channel_scale, (codes.clone(), scales, zeros), group_size, bits)
    with torch.autocast(weight.device.type, enabled=False):
        for _ in range(rounds):
            _measure(rows)
            for at in range(groups):
                rows.move_step(at, h)
            for first in range(0, 0 if scales_only else k, PANEL):
                last = min(first + PANEL, k)
                sums = rows.error[:, :first] @ h[:first, first:last] + rows.error[:, last:] @ h[last:, first:last]
                rows.round_panel(first, sums, h)
    return rows.codes, rows.steps.to(scales.dtype), zeros


def _measure(rows: _Rows) -> None:
    """Compute the errors from codes and steps."""
    parts = rows.codes, rows.steps, TYPES[torch.float32], rows.zeros, rows.n, rows.k, rows.group
    run("dequantize", rows.weight, *parts, rows.weight, TYPES[torch.float32], None, None, rows.error)
    rows.error.neg_()
