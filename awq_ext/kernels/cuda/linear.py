"""The Linear with weights of 4 or 8 bits, on the tensor cores (``csrc/cuda/linear.cu``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import linear as reference
from ..reference.sizes import group_count, group_length
from ..reference.tiles import TILE_BITS, TILE_OUTPUTS, step_count
from .library import FLOATS, TYPES, aligned, expect, on_device, run, value

# fp32 activations beyond so many rows: the weight is dequantized and torch multiplies, because tensor cores have no fp32.
FLOAT_ROWS = 32
# So many rows of fp16 or bf16, or fewer, are never multiplied in parts (kWithoutWgmma of csrc/cuda/linear_wgmma.h).
FEW_ROWS = 16


class _Weight:
    """A checked tiled weight. Messages name ``function``."""

    def __init__(self, function: str, tiles: Tensor, scales: Tensor, zeros: Tensor, k: int, n: int, g: int, bits: int):
        if g != -1 and g <= 0:
            raise ValueError(f"{function}: argument 'group_size': expected -1 or a positive number, got {g}")
        if bits not in TILE_BITS:
            raise ValueError(f"{function}: argument 'bits': expected 4 or 8, got {bits}")
        if k <= 0 or n < 0:
            raise ValueError(f"{function}: expected in_features > 0 and out_features >= 0, got {k} and {n}")
        count, groups = -(-n // TILE_OUTPUTS), group_count(k, g)
        expect(function, "tiles", tiles, tiles, (count, step_count(k, g), 16 * bits), torch.uint8)
        expect(function, "scales", scales, tiles, (count, groups, TILE_OUTPUTS), torch.float16, torch.bfloat16)
        expect(function, "zeros", zeros, tiles, (count, groups, 4 * bits), torch.uint8)
        self.parts = aligned(tiles), aligned(scales), TYPES[scales.dtype], aligned(zeros)
        self.sizes = n, k, group_length(k, g)
        self.steps, self.bits = step_count(k, g), bits


def quant_weight(
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor,
    in_features: int,
    out_features: int,
    group_size: int,
    bits: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dequantize as ``reference.quant_weight``: [N, K], in ``dtype``, to which the exact fp32 value is rounded."""
    w = _Weight("quant_weight", tiles, scales, zeros, in_features, out_features, group_size, bits)
    out = torch.empty(out_features, in_features, dtype=dtype, device=tiles.device)
    run("weight", tiles, *w.parts, *w.sizes, bits, TYPES[dtype], out)
    return out


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
    """Compute as ``reference.quant_linear`` does; products are exact or rounded once, sums are fp32.

    fp16 and bf16 activations stay in their dtype after pre_quant_scale. compute_dtype "int8" rounds activations as on the CPU, and
    is no faster here.
    """
    w = _Weight("quant_linear", tiles, scales, zeros, in_features, out_features, group_size, bits)
    shape = x.shape[:-1]
    expect("quant_linear", "x", x, tiles, (*shape, in_features), *FLOATS)
    if bias is not None:
        expect("quant_linear", "bias", bias, tiles, (out_features,), *FLOATS)
    if pre_quant_scale is not None:
        expect("quant_linear", "pre_quant_scale", pre_quant_scale, tiles, (in_features,), torch.float32)
    if compute_dtype not in ("auto", "int8"):
        raise ValueError(f"quant_linear: argument 'compute_dtype': expected 'auto' or 'int8', got {compute_dtype!r}")
    rows, bias = x.reshape(-1, in_features), None if bias is None else bias.contiguous()
    if compute_dtype == "int8" or x.dtype == torch.float32:
        rows = rows.float() if pre_quant_scale is None else rows.float() * pre_quant_scale
        if compute_dtype == "int8":
            q, scale = reference.int8_activations(rows, group_size)
            rows = q * scale
        return _float_linear(rows, w, bias).to(x.dtype).view(*shape, out_features)
    return _half_linear(rows, w, bias, pre_quant_scale).view(*shape, out_features)


def _half_linear(rows: Tensor, w: _Weight, bias: Tensor | None, pre_quant_scale: Tensor | None) -> Tensor:
    n, k, group = w.sizes
    rows, pitch = aligned(rows), k
    if pre_quant_scale is not None or k % 8 or (group % 4 and group != k):
        pitch = -(-4 * w.steps // 8) * 8
        arranged = rows.new_empty(len(rows), pitch)
        scale = None if pre_quant_scale is None else pre_quant_scale.contiguous()
        run("arrange", rows, rows, TYPES[rows.dtype], scale, len(rows), k, group, pitch, arranged)
        rows = arranged
    y, parts = rows.new_empty(len(rows), n), None
    if len(rows) > FEW_ROWS:
        with on_device(rows):
            count = value("linear_parts", len(rows), *w.sizes)
        if count > 1:
            parts = rows.new_empty(count, len(rows), n, dtype=torch.float32)
    bias_type = 0 if bias is None else TYPES[bias.dtype]
    weight = *w.parts, bias, bias_type, *w.sizes, w.bits
    run("linear", rows, rows, TYPES[rows.dtype], len(rows), pitch, *weight, parts, y)
    return y


def _float_linear(rows: Tensor, w: _Weight, bias: Tensor | None) -> Tensor:
    n, k, _ = w.sizes
    if len(rows) <= FLOAT_ROWS:
        rows, y = rows.contiguous(), rows.new_empty(len(rows), n)
        bias_type = 0 if bias is None else TYPES[bias.dtype]
        run("linear_f32", rows, rows, len(rows), *w.parts, bias, bias_type, *w.sizes, w.bits, y)
        return y
    weight = rows.new_empty(n, k)
    run("weight", rows, *w.parts, *w.sizes, w.bits, TYPES[torch.float32], weight)
    with torch.autocast(rows.device.type, enabled=False):
        return torch.nn.functional.linear(rows, weight, None if bias is None else bias.float())
