"""AutoAWQ's Linears on our CUDA kernels: the arguments of its own, and what they return (fp16)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..checkpoints.formats import LAYOUTS, Settings
from ..kernels import cuda
from ..kernels.reference import tile_scales, tile_zeros


@dataclass(frozen=True)
class _Tiled:
    """A weight in the compute layout. source: tensor and version of the qweight, scales and qzeros that it was made of."""

    parts: tuple[Tensor, Tensor, Tensor]
    sizes: tuple[int, int, int]  # in_features, out_features, group_size
    source: tuple[tuple[int, int], ...]


# a layer's qweight -> its weight as our kernels read it, which goes when the qweight does
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _tiled(layout: str, qweight: Tensor, scales: Tensor, qzeros: Tensor, group_size: int) -> _Tiled:
    """Bring a layer's tensors into the compute layout, once: again only where one of them was replaced or written to."""
    source = tuple((t.data_ptr(), t._version) for t in (qweight, scales, qzeros))
    known = _made.get(qweight)
    if known is not None and known.source == source:
        return known
    tensors = {"qweight": qweight, "scales": scales, "qzeros": qzeros}
    weight = LAYOUTS[layout].unpack(tensors, Settings((group_size,)))
    k, n, size = weight.in_features, weight.out_features, weight.group_size
    tiles = cuda.tile_codes(weight.qweight, k, size, 4)
    parts = tiles, tile_scales(weight.scales.half()), tile_zeros(weight.zeros, 4)
    _made[qweight] = _Tiled(parts, (k, n, size), source)
    return _made[qweight]


def _gemm_group(qweight: Tensor, scales: Tensor) -> int:
    """Tell the group size of a GEMM layer: its functions are not given one."""
    return len(qweight) // len(scales)


@torch.no_grad()
def linear(layout: str, x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, *rest: int) -> Tensor:
    """Compute x [rows, K] @ W^T: fp16 [rows, N], for a layer of AutoAWQ's "awq" (GEMM) or "gemv" layout.

    rest: for "gemv" the group size; then how its own kernel splits the work, which ours does not need.
    """
    group = _gemm_group(qweight, scales) if layout == "awq" else rest[0]
    weight = _tiled(layout, qweight, scales, qzeros, group)
    return cuda.quant_linear(x.half(), *weight.parts, None, None, *weight.sizes, 4)


@torch.no_grad()
def dequantize(qweight: Tensor, scales: Tensor, qzeros: Tensor, *_split: int) -> Tensor:
    """Dequantize a GEMM layer's weight: fp16 [K, N], (code - zero) * scale rounded once."""
    weight = _tiled("awq", qweight, scales, qzeros, _gemm_group(qweight, scales))
    return cuda.quant_weight(*weight.parts, *weight.sizes, 4, torch.float16).T
