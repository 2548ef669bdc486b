"""Conversion to the layout that the kernels of quantized layers read (``csrc/base/layout.h``), and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import pack_int4, unpack_int4
from .sizes import group_length, in_groups

TILE_OUTPUTS, STEP_CHANNELS = 32, 4  # of the compute layout, csrc/base/layout.h
TILE_BITS = (4, 8)  # widths of the codes that it holds


def step_count(in_features: int, group_size: int) -> int:
    """Count the steps of four channels in a row; every group begins a new step."""
    g = group_length(in_features, group_size)
    return in_features // g * -(-g // STEP_CHANNELS) + -(-(in_features % g) // STEP_CHANNELS)


def _tiled_rows(values: Tensor) -> Tensor:
    """Cut rows into tiles: [N, ...] -> [T, 32, ...], padded with zeros."""
    padded = torch.nn.functional.pad(values, (0, 0) * (values.dim() - 1) + (0, -len(values) % TILE_OUTPUTS))
    return padded.view(-1, TILE_OUTPUTS, *values.shape[1:])


def tile_codes(rows: Tensor, in_features: int, group_size: int, bits: int) -> Tensor:
    """Convert rows of codes of 4 or 8 bits to uint8 [T, S, 16 bits]: tiles of 32 outputs, steps of 4 channels.

    rows uint8: for 4 bits packed, [N, ceil(K/2)], for 8 bits [N, K]. For 4 bits byte 4j + 2r + q of a step holds channel 2q + r
    of outputs j (low nibble) and 16 + j (high) of its tile; for 8 bits byte 64v + 4j + 2r + q holds that of output 16v + j.
    """
    steps = step_count(in_features, group_size)
    grouped = in_groups(unpack_int4(rows, in_features) if bits == 4 else rows, group_size)
    codes = torch.nn.functional.pad(grouped, (0, -grouped.shape[2] % STEP_CHANNELS)).flatten(1)
    tiles = _tiled_rows(codes[:, : steps * STEP_CHANNELS])
    halves = tiles.view(-1, 2, 16, steps, 2, 2).permute(1, 0, 3, 2, 5, 4)  # v, t, s, j, r, q
    joined = halves[0] | halves[1] << 4 if bits == 4 else halves.permute(1, 2, 0, 3, 4, 5)
    return joined.reshape(-1, steps, 16 * bits)


def untile_codes(tiles: Tensor, out_features: int, in_features: int, group_size: int, bits: int) -> Tensor:
    """Undo tile_codes."""
    g, steps = group_length(in_features, group_size), tiles.shape[1]
    bytes_ = tiles.view(-1, steps, bits // 4, 16, 2, 2)
    halves = torch.cat((bytes_ & 15, bytes_ >> 4), dim=2) if bits == 4 else bytes_
    rows = halves.permute(0, 2, 3, 1, 5, 4).reshape(-1, steps * STEP_CHANNELS)[:out_features]  # t, v, j, s, q, r
    step = torch.arange(in_features, device=tiles.device)
    place = step // g * -(-g // STEP_CHANNELS) * STEP_CHANNELS + step % g
    return pack_int4(rows[:, place]) if bits == 4 else rows[:, place]


def tile_scales(scales: Tensor) -> Tensor:
    """Convert scales [N, G] to [T, G, 32]."""
    return _tiled_rows(scales).transpose(1, 2).contiguous()


def untile_scales(tiles: Tensor, out_features: int) -> Tensor:
    """Undo tile_scales."""
    return tiles.transpose(1, 2).reshape(-1, tiles.shape[1])[:out_features].contiguous()


def tile_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Convert zeros uint8 [N, G], below 2^bits, to uint8 [T, G, 4 bits].

    For 4 bits byte j holds outputs j (low nibble) and 16 + j of the tile, for 8 bits output j.
    """
    tiles = tile_scales(zeros)
    if bits == 8:
        return tiles
    low, high = tiles.chunk(2, dim=2)
    return low | high << 4


def untile_zeros(tiles: Tensor, out_features: int, bits: int) -> Tensor:
    """Undo tile_zeros."""
    return untile_scales(torch.cat((tiles & 15, tiles >> 4), dim=2) if bits == 4 else tiles, out_features)
