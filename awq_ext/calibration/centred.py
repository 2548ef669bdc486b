"""The second moment of an input around its mean, which guides the search where the bias takes over the mean error.

W is the weight, W' its dequantized codes, E = W - W', and mu the mean of the n rows. With the bias b' = b + E mu the squared output
error falls from tr(E G E^T) to tr(E C E^T), C = G - n mu mu^T (bias correction: arXiv 1906.04721, section 4.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Share of n mu mu^T that C keeps. An entry of G is off by up to 2^-24 of the sum of |x_i x_j| for each row of a chunk (at most
# 1024) and for each chunk (csrc/drivers/stats.h); where inputs hardly vary, that is more than what C is without this share. With
# 2^-13, which is enough for 1024 chunks, C_ii >= (2^-13 - error) G_ii >= 0. Errors of one sign, such as equal rows make, leave C
# positive semidefinite.
KEPT = 2.0**-13
# fp64 numbers in memory at a time: 16 MiB.
_AT_ONCE = 1 << 21


def centred(second_moment: Tensor, total: Tensor, rows: int) -> Tensor:
    """Compute G - (1 - KEPT) n mu mu^T from G fp32 [K, K] and the sum of the rows fp64 [K].

    Returns fp32 [K, K], rounded once from fp64: symmetric, no diagonal entry below 0.
    """
    result = torch.empty_like(second_moment)
    share = (1 - KEPT) / max(rows, 1)
    for part in row_slices(*second_moment.shape):
        # products commute, so the result is symmetric to the last bit
        result[part] = second_moment[part].double().sub_(torch.outer(total[part], total).mul_(share))
    result.diagonal().clamp_min_(0)  # negative only with more chunks than KEPT provides for
    return result


def row_slices(rows: int, columns: int) -> list[slice]:
    """Cut a matrix into slices of rows of which one at a time fits in memory in fp64 (16 MiB)."""
    step = max(1, _AT_ONCE // max(columns, 1))
    return [slice(start, start + step) for start in range(0, rows, step)]
