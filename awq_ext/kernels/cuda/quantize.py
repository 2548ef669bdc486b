"""Rounding to nearest, and the layouts of codes (``csrc/cuda/quantize.cu``, ``pack.cu``): bit for bit as ``reference``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.sizes import group_count, group_length
from ..reference.tiles import TILE_BITS, TILE_OUTPUTS, step_count
from .library import FLOATS, TYPES, aligned, expect, run


@dataclass(frozen=True)
class Grids:
    """How a weight is rounded: the arguments that :func:`quantize_weight` has in common with the searches, checked."""

    group_size: int
    bits: int = 4
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float16

    def check(self, function: str, weight: Tensor, channel_scale: Tensor | None, clip: Tensor | None = None) -> None:
        """Raise ValueError or TypeError, naming ``function``, for what a kernel must not be given."""
        if weight.dim() != 2 or weight.numel() == 0:
            raise ValueError(
                f"{function}: argument 'weight': expected rows and columns, got shape {list(weight.shape)}"
            )
        expect(function, "weight", weight, weight, tuple(weight.shape), *FLOATS)
        if self.group_size != -1 and self.group_size <= 0:
            raise ValueError(
                f"{function}: argument 'group_size': expected -1 or a positive number, got {self.group_size}"
            )
        if not 2 <= self.bits <= 8:
            raise ValueError(f"{function}: argument 'bits': expected 2 to 8, got {self.bits}")
        if self.scale_dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(f"{function}: argument 'scale_dtype': expected float16 or bfloat16, got {self.scale_dtype}")
        n, k = weight.shape
        if channel_scale is not None:
            expect(function, "channel_scale", channel_scale, weight, (k,), torch.float32)
        if clip is not None:
            expect(function, "clip", clip, weight, (n, group_count(k, self.group_size)), torch.float32)

    def launch(
        self,
        weight: Tensor,
        channel_scale: Tensor | None,
        clip: Tensor | None,
        parts: tuple[Tensor | None, ...] = (None, None, None),
        error: Tensor | None = None,
        by_group: bool = False,
    ) -> None:
        """Fill ``parts`` (codes, scales, zeros), or ``error``; all tensors contiguous."""
        n, k = weight.shape
        sizes = n, k, group_length(k, self.group_size), self.bits, self.symmetric, TYPES[self.scale_dtype]
        run("round", weight, weight, TYPES[weight.dtype], *sizes, channel_scale, clip, *parts, error, by_group)


def dense(tensor: Tensor | None) -> Tensor | None:
    """Make an optional tensor contiguous."""
    return None if tensor is None else tensor.contiguous()


def quantize_weight(
    weight: Tensor,
    group_size: int,
    bits: int = 4,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    channel_scale: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight as ``reference.quantize_weight``: codes uint8 [N, K], scales [N, G], zeros uint8 [N, G]."""
    grids = Grids(group_size, bits, symmetric, scale_dtype)
    grids.check("quantize_weight", weight, channel_scale, clip)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = codes.new_empty(len(weight), group_count(weight.shape[1], group_size), dtype=scale_dtype)
    parts = codes, scales, torch.empty_like(scales, dtype=torch.uint8)
    grids.launch(weight.detach().contiguous(), dense(channel_scale), dense(clip), parts)
    return parts


def value_error(
    function: str,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    weight: Tensor | None = None,
    channel_scale: Tensor | None = None,
    divisor: Tensor | None = None,
) -> Tensor:
    """Compute (code - zero) * scale / channel_scale * divisor - weight in fp32 [N, K]; the last three are optional."""
    n, k = codes.shape
    groups = n, group_count(k, group_size) if k else 0
    expect(function, "codes", codes, codes, (n, k), torch.uint8)
    expect(function, "scales", scales, codes, groups, *FLOATS)
    expect(function, "zeros", zeros, codes, groups, torch.uint8)
    if weight is not None:
        expect(function, "weight", weight, codes, (n, k), *FLOATS)
    if channel_scale is not None:
        expect(function, "channel_scale", channel_scale, codes, (k,), torch.float32)
    if divisor is not None:
        expect(function, "divisor", divisor, codes, (n,), torch.float32)
    out = torch.empty(n, k, device=codes.device)
    if out.numel() == 0:
        return out
    parts = codes.contiguous(), scales.contiguous(), TYPES[scales.dtype], zeros.contiguous()
    minus = 0 if weight is None else TYPES[weight.dtype]
    weight, channel_scale, divisor = dense(weight), dense(channel_scale), dense(divisor)
    run("dequantize", codes, *parts, n, k, group_length(k, group_size), weight, minus, channel_scale, divisor, out)
    return out


def dequantize_weight(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """Compute (code - zero) * scale in fp32: [N, K]."""
    return value_error("dequantize_weight", codes, scales, zeros, group_size)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack as ``reference.pack_int4``: uint8 [N, K] -> [N, ceil(K / 2)]."""
    expect("pack_int4", "codes", codes, codes, (len(codes), codes.shape[1]), torch.uint8)
    n, k = codes.shape
    packed = codes.new_empty(n, (k + 1) // 2)
    run("pack", codes, codes.contiguous(), n, k, packed)
    return packed


def unpack_int4(packed: Tensor, in_features: int) -> Tensor:
    """Undo pack_int4: uint8 [N, ceil(K / 2)] -> uint8 [N, K]."""
    expect("unpack_int4", "packed", packed, packed, (len(packed), (in_features + 1) // 2), torch.uint8)
    codes = packed.new_empty(len(packed), in_features)
    run("unpack", packed, packed.contiguous(), len(packed), in_features, codes)
    return codes


def _row_bytes(function: str, in_features: int, group_size: int, bits: int) -> int:
    if bits not in TILE_BITS:
        raise ValueError(f"{function}: argument 'bits': expected 4 or 8, got {bits}")
    if group_size != -1 and group_size <= 0:
        raise ValueError(f"{function}: argument 'group_size': expected -1 or a positive number, got {group_size}")
    return (in_features + 1) // 2 if bits == 4 else in_features


def tile_codes(rows: Tensor, in_features: int, group_size: int, bits: int) -> Tensor:
    """Convert rows of codes as ``reference.tile_codes``: uint8 [T, S, 16 bits]."""
    width = _row_bytes("tile_codes", in_features, group_size, bits)
    expect("tile_codes", "rows", rows, rows, (len(rows), width), torch.uint8)
    tiles = rows.new_empty(-(-len(rows) // TILE_OUTPUTS), step_count(in_features, group_size), 16 * bits)
    sizes = len(rows), in_features, group_length(in_features, group_size), bits
    run("tile", rows, rows.contiguous(), *sizes, tiles)
    return tiles


def untile_codes(tiles: Tensor, out_features: int, in_features: int, group_size: int, bits: int) -> Tensor:
    """Undo tile_codes."""
    width = _row_bytes("untile_codes", in_features, group_size, bits)
    shape = -(-out_features // TILE_OUTPUTS), step_count(in_features, group_size), 16 * bits
    expect("untile_codes", "tiles", tiles, tiles, shape, torch.uint8)
    rows = tiles.new_empty(out_features, width)
    sizes = out_features, in_features, group_length(in_features, group_size), bits
    run("untile", tiles, aligned(tiles), *sizes, rows)
    return rows
