"""What error feedback decides, against exact arithmetic: the factor, and every code that follows from it."""

from __future__ import annotations

import torch
from torch import Tensor

from awq_ext.kernels import reference

EPS = 2.0**-24  # relative error of one fp32 operation


def damped(second_moment: Tensor, order: Tensor, damping: float) -> Tensor:
    """The matrix that is factored, in fp64."""
    h = second_moment.double()[order][:, order]
    return h + (damping * h.diagonal() + 1e-6 * h.diagonal().mean()).diag()


def assert_factor(factor: Tensor, second_moment: Tensor, order: Tensor, damping: float) -> None:
    """R R^T is the damped moment, within Cholesky's backward error.

    That is gamma of at most k + 1 operations an entry, on |R| |R^T| (Higham, Accuracy and Stability, theorem 10.3); H itself is
    rounded once (the damping), and R once more.
    """
    r, h = factor.double(), damped(second_moment, order, damping)
    assert ((r @ r.T - h).abs() <= EPS * (len(h) + 6) * (r.abs() @ r.abs().T)).all()


def assert_decisions(
    parts: tuple[Tensor, Tensor, Tensor], weight: Tensor, factor: Tensor, order: Tensor, group_size: int, bits: int
) -> None:
    """Each code is the nearest to its weight plus what the errors before it ask for, in exact arithmetic.

    weight: fp32, scaled. Where the exact quotient lies as near to the middle of two codes as fp32 sums may be off, either is
    right: a sum of j products is off by at most (j + 2) eps of the sum of magnitudes, the quotient by 3 eps.
    """
    k = weight.shape[1]
    step, zero = (reference.expand_groups(p.float(), k, group_size).double()[:, order] for p in (parts[1], parts[2]))
    codes, w, r = parts[0].double()[:, order], weight.double()[:, order], factor.double()
    error = w - (codes - zero) * step
    above = r.triu(1)
    target = w + error @ above / r.diagonal()
    off = EPS * (torch.arange(k) + 5) * (error.abs() @ above.abs()) / r.diagonal() + EPS * 4 * (target.abs() + w.abs())
    low, high = ((((target + d) / step).round() + zero).clamp(0, 2**bits - 1) for d in (-off, off))
    assert ((low <= codes) & (codes <= high)).all()
    assert (low != high).sum() <= 1 + codes.numel() // 100
