"""Pack eight codes of 4 bits, or four of 8, to an int32 word, in the orders that layouts have, and turn matrices of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...layers.quantized_weight import row_bytes
from .packed import pack_rows

# (distance in rows, bits of a word whose neighbour in that distance is swapped): 8 x 8 codes are transposed by swapping
# quarters, then quarters of quarters, then single codes
_SWAPS = ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F))


def words_of(rows: Tensor) -> Tensor:
    """View packed rows uint8 [R, B] (of 4 or 8 bits) as int32 [R, ceil(B/4)]: lowest bits first, filled with 0."""
    full = pad(rows, (0, -rows.shape[1] % 4)).contiguous()
    # flat, because a single row counts as contiguous with any stride, and then has no view of another size
    return full.flatten().view(torch.int32).view(full.shape[0], full.shape[1] // 4)


def rows_of(words: Tensor, columns: int, bits: int = 4) -> Tensor:
    """Invert words_of: int32 [R, ceil(C * bits / 32)] -> uint8 [R, ceil(C/2)], or [R, C] of 8 bits."""
    rows = words.contiguous().view(torch.uint8)[:, : row_bytes(columns, bits)].contiguous()
    if bits == 4 and columns % 2:
        rows[:, -1] &= 15
    return rows


def pack_words(values: Tensor, bits: int = 4) -> Tensor:
    """Pack values of 4 or 8 bits, uint8 [R, C] -> int32 [R, ceil(C * bits / 32)], lowest bits first, filled with 0."""
    return words_of(pack_rows(values) if bits == 4 else values)


def unpack_words(words: Tensor, columns: int, bits: int = 4) -> Tensor:
    """Invert pack_words: uint8 [R, C]."""
    bytes_ = words.contiguous().view(torch.uint8)
    if bits == 8:
        return bytes_[:, :columns].contiguous()
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(1)[:, :columns].contiguous()


def transposed(words: Tensor, columns: int) -> Tensor:
    """Transpose a matrix of codes: int32 [R, ceil(C/8)] -> int32 [C, ceil(R/8)], filled with 0."""
    words = pad(words, (0, 0, 0, -words.shape[0] % 8))
    blocks = words.T.contiguous().view(words.shape[1], -1, 8)
    lines = [blocks[..., i].contiguous() for i in range(8)]
    for distance, mask in _SWAPS:
        for i in range(8):
            if not i & distance:
                low, high = lines[i], lines[i | distance]
                change = (low >> 4 * distance ^ high) & mask
                lines[i], lines[i | distance] = low ^ change << 4 * distance, high ^ change
    return torch.stack(lines, dim=1).flatten(0, 1)[:columns]


def spread(words: Tensor) -> Tensor:
    """Put codes 0 to 7 of each int32 in the order 0, 2, 4, 6, 1, 3, 5, 7 (lowest bits first), which GPU kernels unpack in pairs."""
    return _swap(_swap(words, 4, 0x00F000F0), 8, 0x0000FF00)


def gathered(words: Tensor) -> Tensor:
    """Invert spread."""
    return _swap(_swap(words, 8, 0x0000FF00), 4, 0x00F000F0)


def _swap(words: Tensor, shift: int, mask: int) -> Tensor:
    """Exchange the bits in ``mask`` with those ``shift`` above."""
    change = (words >> shift ^ words) & mask
    return words ^ change ^ change << shift
