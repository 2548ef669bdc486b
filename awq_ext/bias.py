"""Bias: takes over the mean of a Linear's quantization error (bias correction: arXiv 1906.04721, section 4.2).

With W' for the weight W, and mu the mean input, b' = b + (W - W') mu leaves of the squared output error tr(E G E^T), E = W - W',
only tr(E C E^T), C = G - n mu mu^T the second moment of n rows around their mean: nothing that is the same for every row costs
accuracy. So whatever looks for W' looks at C instead of G, unless a bias of half precision is too large to hold what it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .groups import parameter_owners

# Share of n mu mu^T that C keeps. An entry of G is off by up to 2^-24 of the sum of |x_i x_j| for each row of a chunk (at most
# 1024) and for each chunk (csrc/drivers/stats.h); where inputs hardly vary that is more than what is left of G. With 2^-13, enough
# for 1024 chunks, C_ii >= (2^-13 - error) G_ii >= 0, and errors of one sign, as equal rows make them, leave C positive
# semidefinite.
KEPT = 2.0**-13
# fp64 numbers that are worked on at a time: 16 MiB.
_AT_ONCE = 1 << 21


class CentredStats:
    """An input's ``ActivationStats`` with C (fp32 [K, K], a copy, made when first asked for) for its second moment."""

    def __init__(self, stats: Any) -> None:
        self._stats = stats
        self._second_moment: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows counted."""
        return int(self._stats.rows)

    def sum(self) -> Tensor:
        """Sum over rows of x: fp64 [K]."""
        return self._stats.sum()

    def abs_sum(self) -> Tensor:
        """Sum over rows of |x|: fp64 [K]."""
        return self._stats.abs_sum()

    def second_moment(self) -> Tensor:
        """X^T X around the mean, but for KEPT of the mean's part: fp32 [K, K], symmetric, no diagonal entry below 0."""
        if self._second_moment is None:
            self._second_moment = centred(self._stats.second_moment(), self._stats.sum(), self.rows)
        return self._second_moment


def centred(second_moment: Tensor, total: Tensor, rows: int) -> Tensor:
    """G - (1 - KEPT) n mu mu^T from G fp32 [K, K] and the sum of the rows fp64 [K]: fp32 [K, K]. Rounded once, from fp64."""
    result = torch.empty_like(second_moment)
    share = (1 - KEPT) / max(rows, 1)
    for part in _parts(*second_moment.shape):
        # a product commutes: symmetric to the last bit
        result[part] = second_moment[part].double().sub_(torch.outer(total[part], total).mul_(share))
    result.diagonal().clamp_min_(0)  # more chunks than KEPT provides for
    return result


def mean_error(weight: Tensor, found: Tensor, mean: Tensor) -> Tensor:
    """(W - W') mu, what the bias takes over: fp64 [N]. weight, found: [N, K]; mean fp64 [K]."""
    parts = [(weight[part].double() - found[part]) @ mean for part in _parts(*weight.shape)]
    return torch.cat(parts) if parts else mean.new_zeros(0)


def corrected(bias: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """What ``bias`` [N] takes over of the mean ``error`` fp64 [N], and what its dtype then leaves of it: fp64 [N] each.

    An entry that would leave the range of the dtype stays. Rounding leaves no more than there was: the bias itself needs none.
    """
    moved = (bias.double() + error).to(bias.dtype)
    fits = moved.isfinite()
    left = torch.where(fits, bias.double() + error - moved.double(), error)
    return torch.where(fits, error, 0.0), left


def _parts(rows: int, columns: int) -> list[slice]:
    step = max(1, _AT_ONCE // max(columns, 1))
    return [slice(start, start + step) for start in range(0, rows, step)]


def own_biases(model: nn.Module, linears: Iterable[nn.Linear]) -> set[nn.Linear]:
    """Those of ``linears`` whose bias may be written: a parameter of theirs alone, with memory of its own."""
    owners = parameter_owners(model)
    # a parameter of a class of its own may lie nowhere, or take no writes
    alone = _alone([p for p in model.parameters() if type(p) is nn.Parameter and not p.is_meta])
    found = set()
    for linear in linears:
        bias = linear._parameters.get("bias")
        if bias is None or id(bias) not in alone or len(owners.get(id(bias), ())) != 1:
            continue
        # made in inference mode it cannot be written outside; not contiguous: several entries may lie in one place
        if bias.is_floating_point() and bias.is_contiguous() and not bias.is_inference():
            found.add(linear)
    return found


def _alone(parameters: Sequence[nn.Parameter]) -> set[int]:
    """The ids of those in whose memory no other lies."""
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, id(p)) for p in parameters)
    found, reached = set(), 0
    for (start, end, key), following in zip(spans, [start for start, _, _ in spans[1:]] + [None], strict=True):
        if start >= reached and (following is None or end <= following):
            found.add(key)
        reached = max(reached, end)
    return found
