"""The interleaved layout of llm-awq (safetensors only), which AutoAWQ calls "gemv_fast"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .gemm import AwqLayout, awq_config, awq_settings
from .gemv import group_size_problem, zero_words
from .layout import Summary
from .packed import CheckpointError, PackedLinear, expect
from .settings import Settings
from .words import gathered, spread

ROWS, CHANNELS = 4, 64  # of a tile whose codes lie together
# A zero is stored as the product -scale * zero, rounded to 16 bits: back from bf16 it is at most 15 * 2^-8 = 0.06 off.
ZERO_TOLERANCE = 0.1


def interleave(rows: Tensor) -> Tensor:
    """Interleave packed rows uint8 [N, K/2] -> int16 [N/4, K].

    Within 32 channels, channel 8b + 2a + c goes to place 8a + 4c + b: bytes [b, a] are transposed, then the codes of each of the
    four int32 spread. Then 64 channels of a row (16 int16) are followed by those of the next row, four rows in turn.
    """
    n = rows.shape[0]
    placed = spread(rows.reshape(n, -1, 4, 4).transpose(2, 3).reshape(n, -1).view(torch.int32)).view(torch.int64)
    return placed.view(n // ROWS, ROWS, -1, CHANNELS // 16).transpose(1, 2).reshape(n // ROWS, -1).view(torch.int16)


def natural(words: Tensor) -> Tensor:
    """Invert interleave: int16 [N/4, K] -> uint8 [N, K/2]."""
    quarter = words.shape[0]
    tiles = words.contiguous().view(torch.int64).view(quarter, -1, ROWS, CHANNELS // 16).transpose(1, 2)
    placed = gathered(tiles.reshape(quarter * ROWS, -1).view(torch.int32)).view(torch.uint8)
    return placed.view(quarter * ROWS, -1, 4, 4).transpose(2, 3).reshape(quarter * ROWS, -1)


class GemvFast(AwqLayout):
    """qweight int16 [N/4, K], scales fp16 [8 Z, N], qzeros fp16 [8 Z, N] = -scale * zero; Z as in "gemv"."""

    name = "gemv_fast"
    version = "gemv_fast"
    rows_at = ("scales", 1)
    suffixes = ("qweight", "qzeros", "scales")
    divisors = (8, CHANNELS)

    def problems(self, name: str, layer: PackedLinear) -> list[str]:
        found = super().problems(name, layer) + group_size_problem(layer)
        if layer.bits not in self.widths:
            return found
        scales = self.stored_scales(layer)
        back = layer.zeros if scales is None else _zeros_back(scales, self._products(scales, layer.zeros))
        if back is None or bool(((back != layer.zeros) & (scales != 0)).any()):  # with a scale of 0 all zeros are one
            found.append("a zero times its scale leaves the range of 16 bits: leave the layer float with skip=")
        return found

    @staticmethod
    def _products(scales: Tensor, zeros: Tensor) -> Tensor:
        return -(scales.float() * zeros).to(scales.dtype)

    def pack(self, layer: PackedLinear, summary: Summary | None = None) -> dict[str, Tensor]:
        scales = self.stored_scales(layer)
        size = layer.in_features if layer.group_size == -1 else layer.group_size
        fill = (0, 8 * zero_words(layer.in_features, size) - layer.groups)
        tensors = {
            "qweight": interleave(layer.qweight),
            self.suffixes[1]: pad(self._products(scales, layer.zeros), fill).T.contiguous(),
            "scales": pad(scales, fill).T.contiguous(),
        }
        return tensors if layer.bias is None else tensors | {"bias": layer.bias}

    def unpack(self, tensors: Mapping[str, Tensor], settings: Settings) -> PackedLinear:
        self.require(tensors)
        qweight, scales, products = tensors["qweight"], tensors["scales"], tensors[self.suffixes[1]]
        if qweight.dim() != 2 or scales.dim() != 2:
            raise CheckpointError(f"qweight and scales have shapes {tuple(qweight.shape)} and {tuple(scales.shape)}")
        n, k = qweight.shape[0] * ROWS, qweight.shape[1]
        if k == 0 or k % CHANNELS:
            raise CheckpointError(f"qweight has {k} columns, this layout needs a multiple of {CHANNELS}")
        declared = settings.group_sizes[0] if settings.group_sizes else stored_group_size(scales, k)
        size = k if declared == -1 else declared
        if k % size:
            raise CheckpointError(f"{k} channels do not divide into groups of {size}")
        width, groups = 8 * zero_words(k, size), k // size
        expect("qweight", qweight, (n // ROWS, k), (torch.int16,))
        expect("scales", scales, (width, n), (torch.float16, torch.bfloat16))
        expect(self.suffixes[1], products, (width, n), (scales.dtype,))
        scales = scales[:groups].T.contiguous()
        zeros = _zeros_back(scales, products[:groups].T)
        if zeros is None:
            raise CheckpointError(f"{self.suffixes[1]} are not scales times whole numbers from 0 to -15")
        bias = self.bias_of(tensors, n)
        return PackedLinear(natural(qweight), scales, zeros, k, declared, bias)

    def claims(self, leaves: Mapping[str, torch.dtype]) -> bool:
        return leaves.get("qweight") == torch.int16 and self.suffixes[1] in leaves


class LlmAwq(GemvFast):
    """The same with the products named ``scaled_zeros``, scales fp16 or bf16, and no config that says so."""

    name = "llm-awq"
    suffixes = ("qweight", "scaled_zeros", "scales")
    scale_dtypes = (torch.float16, torch.bfloat16)

    def quantization_config(self, summary: Summary) -> dict[str, Any]:
        return awq_config(summary, "llm-awq")

    def reads(self, config: Mapping[str, Any]) -> Settings | None:
        return awq_settings(config, "llm-awq", "llm_awq")


def stored_group_size(scales: Tensor, in_features: int) -> int:
    """Tell the group size from scales [8 Z, N] padded with rows of zeros, for files without a config."""
    used = int((scales != 0).any(1).nonzero().max()) + 1 if scales.numel() and scales.any() else 0
    if used == 0 or in_features % used:
        raise CheckpointError(f"{used} rows of scales do not divide {in_features} channels")
    return in_features // used


def _zeros_back(scales: Tensor, products: Tensor) -> Tensor | None:
    """Divide products = -scale * zero by the scales: zeros uint8; None if they are no whole numbers from 0 to 15."""
    ratio = torch.where(scales == 0, 0.0, -products.double() / scales.double())
    zeros = ratio.round()
    fits = (ratio - zeros).abs().le(ZERO_TOLERANCE) & zeros.ge(0) & zeros.le(15)
    return zeros.to(torch.uint8) if bool(fits.all()) else None
