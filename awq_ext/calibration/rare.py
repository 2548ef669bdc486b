"""Rare channels: those that few calibration rows drive, and how the search is kept from spending them.

A hidden unit behind a GELU may be next to silent on all calibration rows and loud on others. Then errors in its weights seem to
cost nothing: AWQ's scale makes them coarse, and error feedback moves there what the other channels' errors leave. Damping in
proportion to a channel's own second moment (``damping``) does not prevent it, because that is next to nothing. So a rare
channel's second moment is raised towards the median over channels, the more the fewer rows it rests on. Shrinkage estimates
variances like that (Opgen-Rhein and Strimmer 2007, doi 10.2202/1544-6115.1252: towards their median). Here each channel has an
intensity of its own, which is 0 from ``ENOUGH`` rows on. Measurements: docs/research.md, "Rare channels".

The rows that drive a channel: r = (sum of |x|)^2 / sum of x^2. That is 1 if x is 0 on all rows but one, n if |x| is the same on
all n, and 0.64 n for normal values. A channel that is small on all rows alike is not rare.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows from which on a channel is not rare. On SmolLM2 each has at least 38 of 512 tokens, and 814 of 8,192.
ENOUGH = 32
# Where rows are few, this share of them is enough.
_SHARE = 1 / 32


def lack_of_rows(rows: int, abs_sum: Tensor, squares: Tensor) -> Tensor | None:
    """Tell how far each channel is from having enough rows, 1 - r / enough: fp32 [K] in [0, 1]; None where all have enough.

    abs_sum, squares: the sums of |x| and of x^2 over ``rows`` rows, [K] each. A channel that is 0 on every row lacks nothing: it
    has no correlations, so no error moves there, and its scale is 1.
    """
    total, squares = abs_sum.double(), squares.double()
    driving = torch.where(squares > 0, total.square() / squares, 0.0)
    enough = max(1.0, min(ENOUGH, rows * _SHARE))
    lack = torch.where(total > 0, 1 - driving / enough, 0.0).clamp_min_(0).float()
    return lack if bool((lack > 0).any()) else None


def raised(moment: Tensor, lack: Tensor) -> Tensor:
    """Raise entries of the diagonal of ``moment`` fp32 [K, K] to its median times their ``lack`` [K], in place; return it.

    The median is that of entries above 0. Entries that are larger stay as they are.
    """
    diagonal = moment.diagonal()
    alive = diagonal[diagonal > 0]
    if len(alive):
        diagonal.copy_(diagonal.maximum(alive.median() * lack))
    return moment
