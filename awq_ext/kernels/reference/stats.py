"""Streaming statistics of the inputs of a Linear."""

from __future__ import annotations

import torch
from torch import Tensor


class ActivationStats:
    """Streaming statistics of the rows that enter a Linear: sums of x and |x|, X^T X, row count.

    sum, abs_sum fp64 [K]; second_moment fp32 [K, K], un-normalized; rows int. Rows where ``mask`` is False do not count. With
    weights w the sums are of w x, sqrt(w) |x| and w x x^T, where w is divided by its mean when they are read; rows stays a count.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.in_features = in_features
        self.rows = 0
        self._total = 0.0  # sum of the weights of all rows
        self._weighted = False
        self._applied = 1.0  # the share that _second_moment is already multiplied by
        self._sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._abs_sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._second_moment = torch.zeros(in_features, in_features, device=device)

    def update(self, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add the rows of x [..., K] (fp32/bf16/fp16, any strides); mask bool with one element per row.

        weights: of the rows, fp32, one per row, >= 0; None: all 1. Rows are multiplied by sqrt(w) in fp32.
        """
        flat = x.detach().reshape(-1, self.in_features)
        if weights is not None:
            weights = one_a_row(weights, len(flat)).to(flat.device)
        if mask is not None:
            kept = mask.reshape(-1).to(flat.device)
            flat, weights = flat[kept], None if weights is None else weights[kept]
        if weights is not None and not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError("ActivationStats.update: argument 'weights': expected finite numbers from 0")
        flat = flat.float()
        self._set_applied(1.0)
        with torch.autocast(flat.device.type, enabled=False):
            if weights is None:
                self._sum += flat.double().sum(0)
            else:
                self._sum += weights.double() @ flat.double()
                flat = flat * weights.sqrt()[:, None]
            self._abs_sum += flat.double().abs().sum(0)
            self._second_moment += flat.T @ flat
        self.rows += flat.shape[0]
        self._total += len(flat) if weights is None else float(weights.double().sum())
        self._weighted |= weights is not None

    @property
    def _share(self) -> float:
        return self.rows / self._total if self._weighted and self._total > 0 else 1.0

    def _set_applied(self, share: float) -> None:
        """Scale the second moment by ``share``, in place because a copy would take as much memory again."""
        if share != self._applied:
            self._second_moment *= share / self._applied
            self._applied = share

    def sum(self) -> Tensor:
        """Return the sum over rows of w x: fp64 [K]."""
        return self._sum * self._share if self._weighted else self._sum

    def abs_sum(self) -> Tensor:
        """Return the sum over rows of sqrt(w) |x|: fp64 [K]."""
        return self._abs_sum * self._share**0.5 if self._weighted else self._abs_sum

    def second_moment(self) -> Tensor:
        """Return the sum over rows of w x x^T, full and symmetric: fp32 [K, K]."""
        self._set_applied(self._share)
        return self._second_moment


def one_a_row(weights: Tensor, rows: int) -> Tensor:
    """Check that weights are fp32, one for each row: [rows], detached. TypeError or ValueError otherwise."""
    if weights.dtype != torch.float32:
        raise TypeError(f"ActivationStats.update: argument 'weights': expected float32, got {weights.dtype}")
    if weights.numel() != rows:
        raise ValueError(
            f"ActivationStats.update: argument 'weights': expected {rows} elements, one a row, got {weights.numel()}"
        )
    return weights.detach().reshape(-1)
