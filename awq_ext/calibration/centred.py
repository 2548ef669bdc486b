"""The second moment of an input around its mean, by which Linears are searched whose bias takes over the mean of the error.

With W' for the weight W, and mu the mean input, b' = b + (W - W') mu leaves of the squared output error tr(E G E^T), E = W - W',
only tr(E C E^T), C = G - n mu mu^T (bias correction: arXiv 1906.04721, section 4.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Share of n mu mu^T that C keeps. An entry of G is off by up to 2^-24 of the sum of |x_i x_j| for each row of a chunk (at most
# 1024) and for each chunk (csrc/drivers/stats.h); where inputs hardly vary that is more than what is left of G. With 2^-13, which
# is enough for 1024 chunks, C_ii >= (2^-13 - error) G_ii >= 0, and errors of one sign, as equal rows make them, leave C positive
# semidefinite.
KEPT = 2.0**-13
# fp64 numbers that are worked on at a time: 16 MiB.
_AT_ONCE = 1 << 21


def centred(second_moment: Tensor, total: Tensor, rows: int) -> Tensor:
    """Compute G - (1 - KEPT) n mu mu^T from G fp32 [K, K] and the sum of the rows fp64 [K].

    Returns fp32 [K, K], rounded once from fp64: symmetric, no diagonal entry below 0.
    """
    result = torch.empty_like(second_moment)
    share = (1 - KEPT) / max(rows, 1)
    for part in row_slices(*second_moment.shape):
        # a product commutes: symmetric to the last bit
        result[part] = second_moment[part].double().sub_(torch.outer(total[part], total).mul_(share))
    result.diagonal().clamp_min_(0)  # more chunks than KEPT provides for
    return result


def row_slices(rows: int, columns: int) -> list[slice]:
    """Cut a matrix into slices of rows that can be worked on in fp64 at a time."""
    step = max(1, _AT_ONCE // max(columns, 1))
    return [slice(start, start + step) for start in range(0, rows, step)]
