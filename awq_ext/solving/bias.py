"""Bias correction: the bias takes over the mean of its Linear's quantization error (arXiv 1906.04721, section 4.2).

W is the weight, W' its dequantized codes, E = W - W', and mu the mean of the n calibration rows; the new bias is b' = b + E mu.
Of the squared output error tr(E G E^T) that leaves tr(E C E^T), where C = G - n mu mu^T is the second moment around the mean: an
error that is the same for every row costs no accuracy. The search for W' therefore uses C in place of G
(``calibration/centred.py``), unless the bias is in half precision and so large that rounding it loses what it takes over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..calibration.centred import row_slices
from ..modules import parameter_owners


def mean_error(weight: Tensor, found: Tensor, mean: Tensor) -> Tensor:
    """Compute the mean error (W - W') mu that the bias takes over: fp64 [N]. weight, found: [N, K]; mean fp64 [K]."""
    parts = [(weight[part].double() - found[part]) @ mean for part in row_slices(*weight.shape)]
    return torch.cat(parts) if parts else mean.new_zeros(0)


def corrected(bias: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Split the mean ``error`` fp64 [N] into what ``bias`` [N] takes over and what its dtype then leaves of it: fp64 [N] each.

    An entry that would leave the range of the dtype stays as it is. Rounding never leaves more than the error itself, because the
    old bias is a number of the dtype.
    """
    moved = (bias.double() + error).to(bias.dtype)
    fits = moved.isfinite()
    left = torch.where(fits, bias.double() + error - moved.double(), error)
    return torch.where(fits, error, 0.0), left


def own_biases(model: nn.Module, linears: Iterable[nn.Linear]) -> set[nn.Linear]:
    """Find the ``linears`` whose bias may be written: a parameter of this Linear alone, in memory that it shares with none."""
    owners = parameter_owners(model)
    # parameters of a subclass may have no memory, or refuse writes
    alone = _alone([p for p in model.parameters() if type(p) is nn.Parameter and not p.is_meta])
    found = set()
    for linear in linears:
        bias = linear._parameters.get("bias")
        if bias is None or id(bias) not in alone or len(owners.get(id(bias), ())) != 1:
            continue
        # a tensor made in inference mode cannot be written outside it; entries of a non-contiguous one may share memory
        if bias.is_floating_point() and bias.is_contiguous() and not bias.is_inference():
            found.add(linear)
    return found


def _alone(parameters: Sequence[nn.Parameter]) -> set[int]:
    """Return the ids of the parameters whose memory no other one overlaps."""
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, id(p)) for p in parameters)
    found, reached = set(), 0
    for (start, end, key), following in zip(spans, [start for start, _, _ in spans[1:]] + [None], strict=True):
        if start >= reached and (following is None or end <= following):
            found.add(key)
        reached = max(reached, end)
    return found
