"""Bias: takes over the mean of a Linear's quantization error (bias correction: arXiv 1906.04721, section 4.2).

With W' for the weight W, and mu the mean input, b' = b + (W - W') mu leaves of the squared output error tr(E G E^T), E = W - W',
only tr(E C E^T), C = G - n mu mu^T the second moment of n rows around their mean: nothing that is the same for every row costs
accuracy. So whatever looks for W' looks at C instead of G (``calibration/centred.py``), unless a bias of half precision is too
large to hold what it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..calibration.centred import row_slices
from ..modules import parameter_owners


def mean_error(weight: Tensor, found: Tensor, mean: Tensor) -> Tensor:
    """(W - W') mu, what the bias takes over: fp64 [N]. weight, found: [N, K]; mean fp64 [K]."""
    parts = [(weight[part].double() - found[part]) @ mean for part in row_slices(*weight.shape)]
    return torch.cat(parts) if parts else mean.new_zeros(0)


def corrected(bias: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """What ``bias`` [N] takes over of the mean ``error`` fp64 [N], and what its dtype then leaves of it: fp64 [N] each.

    An entry that would leave the range of the dtype stays. Rounding leaves no more than there was: the bias itself needs none.
    """
    moved = (bias.double() + error).to(bias.dtype)
    fits = moved.isfinite()
    left = torch.where(fits, bias.double() + error - moved.double(), error)
    return torch.where(fits, error, 0.0), left


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
