"""AutoAWQ "gemv": rows of codes in their natural order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from .gemm import AwqLayout
from .layout import FLOATS, Summary
from .packed import CheckpointError, PackedLinear, expect
from .settings import Settings
from .words import pack_words, rows_of, unpack_words, words_of

PADDED_TO = {64: 2, 32: 4}  # words of zeros a row are a multiple of this; of 1 for groups of 128 and more


def zero_words(in_features: int, group_size: int) -> int:
    """Count the int32 words of zeros (8 each) of a row, padding included."""
    groups = in_features // group_size if group_size != -1 else 1
    multiple = PADDED_TO.get(group_size, 1)
    return -(-groups // (8 * multiple)) * multiple


def group_size_problem(layer: PackedLinear) -> list[str]:
    """Check for the group sizes that AutoAWQ's gemv kernels know."""
    size = layer.in_features if layer.group_size == -1 else layer.group_size
    if size in PADDED_TO or size >= 128:
        return []
    return [f"group_size={layer.group_size} is not one of 32, 64, 128 and more: quantize with one of these"]


class Gemv(AwqLayout):
    """qweight int32 [N, K/8], qzeros int32 [N, Z], scales fp16 [N, 8 Z], all in natural order, Z = zero_words(K, g)."""

    name = "gemv"
    version = "gemv"
    rows_at = ("scales", 0)
    suffixes = ("qweight", "qzeros", "scales")
    divisors = (8, 8)

    def problems(self, name: str, layer: PackedLinear) -> list[str]:
        return super().problems(name, layer) + group_size_problem(layer)

    def pack(self, layer: PackedLinear, summary: Summary | None = None) -> dict[str, Tensor]:
        size = layer.in_features if layer.group_size == -1 else layer.group_size
        width = 8 * zero_words(layer.in_features, size)
        tensors = {
            "qweight": words_of(layer.qweight),
            "qzeros": pack_words(pad(layer.zeros, (0, width - layer.groups))),
            "scales": pad(self.stored_scales(layer), (0, width - layer.groups)),
        }
        return tensors if layer.bias is None else tensors | {"bias": layer.bias}

    def unpack(self, tensors: Mapping[str, Tensor], settings: Settings) -> PackedLinear:
        self.require(tensors)
        qweight = tensors["qweight"]
        if qweight.dim() != 2:
            raise CheckpointError(f"qweight has shape {tuple(qweight.shape)}, two dimensions are needed")
        n, k = qweight.shape[0], qweight.shape[1] * 8
        size = settings.group_sizes[0] if settings.group_sizes[0] != -1 else k
        if k == 0 or k % size:
            raise CheckpointError(f"{k} channels do not divide into groups of {size}")
        words, groups = zero_words(k, size), k // size
        expect("qweight", qweight, (n, k // 8), (torch.int32,))
        expect("qzeros", tensors["qzeros"], (n, words), (torch.int32,))
        expect("scales", tensors["scales"], (n, words * 8), FLOATS)
        return PackedLinear(
            qweight=rows_of(qweight, k),
            scales=tensors["scales"][:, :groups].contiguous(),
            zeros=unpack_words(tensors["qzeros"], groups),
            in_features=k,
            group_size=settings.group_sizes[0],
            bias=self.bias_of(tensors, n),
        )

    def claims(self, leaves: Mapping[str, torch.dtype]) -> bool:
        return leaves.get("qweight") == torch.int32
