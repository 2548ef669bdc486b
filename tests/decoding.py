"""Tensors of one layer in every format -> codes, zeros and scales: by the table of docs/formats.md, in plain torch.

Nothing here is the package's own. ``n``, ``k`` and ``g`` are tensors of row, channel and group numbers that broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PLACE = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # of column 8c + j in word c of "awq"


@dataclass(frozen=True)
class Layer:
    """A layer's tensors by suffix, and the bits that the config says it has."""

    tensors: dict[str, Tensor]
    bits: int

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def field(self, words: Tensor, place: Tensor) -> Tensor:
        """The number of ``bits`` bits at this place, the lowest first."""
        return words.long() >> self.bits * place & (1 << self.bits) - 1

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @property
    def middle(self) -> int:
        return 1 << self.bits - 1


Find = Callable[[Layer, Tensor, Tensor], Tensor]


class Format(NamedTuple):
    """How to find a code at (n, k), a zero and a scale at (n, g)."""

    code: Find
    zero: Find
    scale: Find


def _quotients(products: str) -> Find:
    """Zeros that are stored as -scale * zero, rounded: [G, N]."""

    def zero(t: Layer, n: Tensor, g: Tensor) -> Tensor:
        return (-t[products][g, n].double() / t["scales"][g, n].double()).round().long()

    return zero


def _interleaved(t: Layer, n: Tensor, k: Tensor) -> Tensor:
    i, b, a, c = k // 32, k % 32 // 8, k % 8 // 2, k % 2
    place = 32 * i + 8 * a + 4 * c + b
    column = place // 64 * 64 + n % 4 * 16 + place % 64 // 4
    return t.field(t["qweight"][n // 4, column], place % 4)


def _packed(t: Layer, n: Tensor, k: Tensor) -> Tensor:
    return t.field(t["weight_packed"][n, k // t.per_word], k % t.per_word)


def _zero_point(t: Layer, n: Tensor, g: Tensor) -> Tensor:
    if "weight_zero_point" not in t.tensors:
        return torch.full_like(n * g, t.middle)
    return t.field(t["weight_zero_point"][n // t.per_word, g], n % t.per_word)


def _half(t: Layer, n: Tensor, g: Tensor, start: int) -> Tensor:
    low, high = (t["blocks"][n, g, start + byte].int() for byte in (0, 1))
    return (low | high << 8).to(torch.int16).view(torch.float16).double()


def _in_block(t: Layer, n: Tensor, k: Tensor) -> Tensor:
    blocks = t["blocks"]
    if t.bits == 8:
        return blocks[n, k // 32, 2 + k % 32].long() ^ 128  # two's complement
    start = blocks.shape[2] - 16  # behind the scale, and the offset if there is one
    return t.field(blocks[n, k // 32, start + k % 16], k % 32 // 16)


def _of_offset(t: Layer, n: Tensor, g: Tensor) -> Tensor:
    if t["blocks"].shape[2] != 20:
        return torch.full_like(n * g, t.middle)
    return (-_half(t, n, g, 2) / _half(t, n, g, 0)).round().long()


def _rows(name: str) -> Find:
    return lambda t, n, g: t[name][n, g].double()


def _columns(name: str) -> Find:
    return lambda t, n, g: t[name][g, n].double()


_COMPRESSED = Format(_packed, _zero_point, _rows("weight_scale"))
FORMATS: dict[str, Format] = {
    "awq": Format(
        lambda t, n, k: t.field(t["qweight"][k, n // 8], PLACE[n % 8]),
        lambda t, n, g: t.field(t["qzeros"][g, n // 8], PLACE[n % 8]),
        _columns("scales"),
    ),
    "gemv": Format(
        lambda t, n, k: t.field(t["qweight"][n, k // 8], k % 8),
        lambda t, n, g: t.field(t["qzeros"][n, g // 8], g % 8),
        _rows("scales"),
    ),
    "gemv_fast": Format(_interleaved, _quotients("qzeros"), _columns("scales")),
    "llm-awq": Format(_interleaved, _quotients("scaled_zeros"), _columns("scales")),
    "compressed-tensors": _COMPRESSED,
    "compressed-tensors-w8a8": Format(
        lambda t, n, k: t["weight"][n, k].long() + 128 if t.bits == 8 else _packed(t, n, k),
        _zero_point,
        _COMPRESSED.scale,
    ),
    "gptq": Format(
        lambda t, n, k: t.field(t["qweight"][k // t.per_word, n], k % t.per_word),
        lambda t, n, g: t.field(t["qzeros"][g, n // t.per_word], n % t.per_word) + 1,
        _columns("scales"),
    ),
    "modelopt": Format(
        lambda t, n, k: t.field(t["weight"][n // 2, k], n % 2) ^ 8,  # two's complement
        lambda t, n, g: torch.full_like(n * g, 8),
        _rows("weight_scale"),
    ),
    "gguf": Format(_in_block, _of_offset, lambda t, n, g: _half(t, n, g, 0)),
    "mlx": Format(
        lambda t, n, k: t.field(t["weight"].view(torch.int32)[n, k // t.per_word], k % t.per_word),
        lambda t, n, g: (-t["biases"][n, g].double() / t["scales"][n, g].double()).round().long(),
        _rows("scales"),
    ),
    "native": Format(
        lambda t, n, k: t["qweight"][n, k].long() if t.bits == 8 else t.field(t["qweight"][n, k // 2], k % 2),
        lambda t, n, g: t["zeros"][n, g].long(),
        _rows("scales"),
    ),
}


class Decoded(NamedTuple):
    """codes int64 [N, K], zeros int64 [N, G], scales fp64 [N, G]."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor

    def weight(self) -> Tensor:
        """fp64 [N, K], in which no product is rounded."""
        length = self.codes.shape[1] // self.zeros.shape[1]
        zeros, scales = (tensor.repeat_interleave(length, 1) for tensor in (self.zeros, self.scales))
        return (self.codes - zeros) * scales


def decode(format: str, tensors: dict[str, Tensor], shape: tuple[int, int, int], bits: int) -> Decoded:
    """All of a layer of this shape: outputs, inputs, groups."""
    layer, found = Layer(tensors, bits), FORMATS[format]
    n, k, g = (torch.arange(size) for size in shape)
    return Decoded(*(find(layer, n[:, None], at) for find, at in zip(found, (k, g, g), strict=True)))
