"""Blocks of GGUF: Q4_0, Q4_1 and Q8_0 of llama.cpp, 32 weights each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout, Summary
from ..packed import CheckpointError, PackedLinear, expect, middle_code, pack_rows
from ..settings import Settings, anything, require_known

BLOCK = 32  # weights
Q4_0, Q4_1, Q8_0 = "Q4_0", "Q4_1", "Q8_0"
SIZES = {Q4_0: 18, Q4_1: 20, Q8_0: 34}  # bytes of a block
_TYPES = {size: kind for kind, size in SIZES.items()}
_NEAR = 2**-5  # of a step: how far an offset may lie from a code; fp16 rounds that of 15 codes by 15 * 2^-11


class Gguf(Layout):
    """blocks uint8 [N, K/32, B]: fp16 scale d, in Q4_1 fp16 offset m, then the codes of 32 channels; B tells the type.

    Q4_0 (symmetric, 4 bits): d * (q - 8); Q4_1: d * q + m; both have channel i in the low half of byte i, channel i + 16 in the
    high one. Q8_0 (symmetric, 8 bits): d * q, q of two's complement. m = -zero * scale rounded to fp16: off by 15 * 2^-11 of a step
    at most, and so exact that the zero is found again.
    """

    name = "gguf"
    rows_at = ("blocks", 0)
    suffixes = ("blocks",)
    widths = (4, 8)
    mixes_group_sizes = True
    quantized_heads = True
    divisors = (1, BLOCK)
    default_group_size = BLOCK  # there are no larger blocks
    symmetric_bits = (8,)  # Q8_0 has no zeros
    own_writer = True
    joined_experts = True  # of architectures that have names for them

    def problems(self, name: str, layer: PackedLinear) -> list[str]:
        found = super().problems(name, layer)
        if layer.group_size != -1 and layer.group_size % BLOCK:
            found.append(
                f"group_size={layer.group_size} is not a multiple of {BLOCK}: quantize with group_size={BLOCK}"
            )
        if layer.bits == 8 and not layer.symmetric:
            found.append(
                'it has 8 bits and zero points, for which there is no block: add "symmetric": true to its entry of per_layer, or, '
                "where all layers have 8 bits, quantize with symmetric=True"
            )
        scales = self.stored_scales(layer)
        if layer.bits == 4 and not layer.symmetric and scales is not None and not _recovered(scales, layer.zeros):
            found.append(
                "zero * scale leaves the range in which float16 tells the zeros apart: quantize with symmetric=True"
            )
        return found

    def pack(self, layer: PackedLinear, summary: Summary | None = None) -> dict[str, Tensor]:
        repeats = (layer.in_features // layer.groups) // BLOCK  # blocks that share a scale
        scales = self.stored_scales(layer).repeat_interleave(repeats, dim=1)
        codes = layer.codes().unflatten(1, (-1, BLOCK))
        parts = [_bytes(scales)]
        if layer.bits == 8:
            parts.append(codes ^ middle_code(8))
        else:
            if not layer.symmetric:
                zeros = layer.zeros.repeat_interleave(repeats, dim=1)
                parts.append(_bytes((-zeros.float() * scales.float()).half()))
            parts.append(codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4)
        tensors = {"blocks": torch.cat(parts, dim=-1)}
        return tensors if layer.bias is None else tensors | {"bias": layer.bias}

    def unpack(self, tensors: Mapping[str, Tensor], settings: Settings) -> PackedLinear:
        self.require(tensors)
        blocks = tensors["blocks"]
        if blocks.dim() != 3 or blocks.shape[2] not in _TYPES or 0 in blocks.shape:
            raise CheckpointError(f"blocks has shape {tuple(blocks.shape)}; 18, 20 or 34 bytes each are needed")
        n, groups, size = blocks.shape
        expect("blocks", blocks, (n, groups, size), (torch.uint8,))
        kind, k, bias = _TYPES[size], groups * BLOCK, self.bias_of(tensors, n)
        bits = 8 if kind == Q8_0 else 4
        scales, rest = _halves(blocks[..., :2]), blocks[..., 2:]
        zeros = torch.full((n, groups), middle_code(bits), dtype=torch.uint8)
        if kind == Q4_1:
            zeros, rest = _zeros(scales, _halves(rest[..., :2])), rest[..., 2:]
        if kind == Q8_0:
            rows = (rest ^ middle_code(8)).flatten(1).contiguous()
        else:
            rows = pack_rows(torch.cat((rest & 15, rest >> 4), dim=-1).flatten(1))
        return PackedLinear(rows, scales, zeros, k, BLOCK, bias, bits=bits)

    def quantization_config(self, summary: Summary) -> dict[str, Any]:
        return {"quant_method": "gguf", "modules_to_not_convert": list(summary.float_linears) or None}

    def foresee(self, source: Any, config: Mapping[str, Any]) -> None:
        from ...gguf.writing import foreseen  # which is made of layouts

        foreseen(source, config)

    def write_weights(self, folder: Path, source: Any, summary: Summary, config: Mapping[str, Any]) -> bool:
        from ...gguf.writing import write_gguf

        write_gguf(folder, source, self, summary, config)
        return True

    def reads(self, config: Mapping[str, Any]) -> Settings | None:
        if config.get("quant_method") != "gguf":
            return None
        require_known(config, dict.fromkeys(("quant_method", "modules_to_not_convert"), anything))
        return Settings((BLOCK,))


def block_type(bits: int, symmetric: bool) -> str:
    """Name the type of a layer's blocks."""
    return Q8_0 if bits == 8 else Q4_0 if symmetric else Q4_1


def _bytes(values: Tensor) -> Tensor:
    """View fp16 [N, G] as uint8 [N, G, 2]."""
    return values.contiguous().view(torch.uint8).unflatten(1, (-1, 2))


def _halves(bytes_: Tensor) -> Tensor:
    """Invert _bytes."""
    return bytes_.contiguous().flatten(1).view(torch.float16)


def _steps(scales: Tensor, offsets: Tensor) -> Tensor:
    """Measure offsets in steps, downwards: 0 where there is neither."""
    return torch.where(offsets == 0, torch.zeros(()), -offsets.double() / scales.double())


def _recovered(scales: Tensor, zeros: Tensor) -> bool:
    """Tell whether the offsets of these zeros, rounded to fp16, lead back to them."""
    offsets = (-zeros.float() * scales.float()).half()
    return bool(((_steps(scales, offsets) - zeros).abs() <= _NEAR).all())


def whole_zeros(scales: Tensor, offsets: Tensor) -> bool:
    """Tell whether every offset is that of a zero from 0 to 15."""
    steps = _steps(scales, offsets)
    zeros = steps.round()
    return bool(((steps - zeros).abs() <= _NEAR).all()) and bool(((zeros >= 0) & (zeros <= 15)).all())


def _zeros(scales: Tensor, offsets: Tensor) -> Tensor:
    """Find the zeros of offsets; CheckpointError where they lie between codes."""
    if not whole_zeros(scales, offsets):
        raise CheckpointError(
            "its offsets lie between codes, as those of llama.cpp's own quantizer do in Q4_1: a zero must be a whole number "
            "from 0 to 15 (Q4_0 and Q8_0 can be read)"
        )
    return _steps(scales, offsets).round().to(torch.uint8)
