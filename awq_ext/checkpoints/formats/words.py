"""Eight codes to an int32 word: the orders in which layouts put them, and how they are turned."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .packed import pack_rows

# (distance in rows, bits of a word whose neighbour in that distance is swapped): 8 x 8 codes are transposed by swapping
# quarters, then quarters of quarters, then single codes
_SWAPS = ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F))


def words_of(rows: Tensor) -> Tensor:
    """Packed rows uint8 [R, C/2] (as in QuantLinear) -> int32 [R, ceil(C/8)]: the same bytes, lowest bits first, filled with 0."""
    return pad(rows, (0, -rows.shape[1] % 4)).contiguous().view(torch.int32)


def rows_of(words: Tensor, columns: int) -> Tensor:
    """Inverse of words_of: int32 [R, ceil(C/8)] -> uint8 [R, ceil(C/2)]."""
    rows = words.contiguous().view(torch.uint8)[:, : (columns + 1) // 2].contiguous()
    if columns % 2:
        rows[:, -1] &= 15
    return rows


def pack_words(values: Tensor) -> Tensor:
    """uint8 [R, C] values below 16 -> int32 [R, ceil(C/8)], lowest bits first, filled with 0."""
    return words_of(pack_rows(values))


def unpack_words(words: Tensor, columns: int) -> Tensor:
    """Inverse of pack_words: uint8 [R, C]."""
    bytes_ = words.contiguous().view(torch.uint8)
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(1)[:, :columns].contiguous()


def transposed(words: Tensor, columns: int) -> Tensor:
    """int32 [R, ceil(C/8)] -> int32 [C, ceil(R/8)]: the matrix of codes transposed, filled with 0."""
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
    """Codes 0 to 7 of each int32 in the order 0, 2, 4, 6, 1, 3, 5, 7 (lowest bits first), which GPU kernels unpack in pairs."""
    return _swap(_swap(words, 4, 0x00F000F0), 8, 0x0000FF00)


def gathered(words: Tensor) -> Tensor:
    """Inverse of spread."""
    return _swap(_swap(words, 8, 0x0000FF00), 4, 0x00F000F0)


def _swap(words: Tensor, shift: int, mask: int) -> Tensor:
    """Exchange the bits in ``mask`` with those ``shift`` above."""
    change = (words >> shift ^ words) & mask
    return words ^ change ^ change << shift
