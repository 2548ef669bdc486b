"""Folding 1/s into what produces a group's input: a norm or an earlier Linear. ``proof.py`` finds out which one it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..forwards.probe import combined

Change = tuple[nn.Module, str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class NormFold:
    """A norm that takes over 1/s: "plain" multiplies by its weight w, "offset" by 1 + w.

    width: input channels K of the group; a norm of each head (w is shorter) comes back every len(w) channels. None: len(w).
    readers: parameters [., K] that read the output as well and stay float (routers), as (module, name).
    """

    module: nn.Module
    kind: str
    width: int | None = None
    readers: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def units(self) -> int:
        """Factors that can be chosen freely: one an entry of w."""
        return len(self.module.weight)

    @property
    def _heads(self) -> int:
        return (self.width or self.units) // self.units

    def channels(self, units: Tensor) -> Tensor:
        """Factors [units] -> factors of the group's input channels [K]."""
        return units.repeat(self._heads)

    def tie(self, scale: Tensor) -> Tensor:
        """The scales nearest to ``scale`` [..., K] that can be folded: geometric means over channels of one entry of w."""
        if self._heads == 1:
            return scale
        mean = scale.log().unflatten(-1, (self._heads, self.units)).mean(-2, keepdim=True).exp()
        return mean.expand(*mean.shape[:-2], self._heads, self.units).flatten(-2)

    def changes(self, scale: Tensor) -> list[Change]:
        """The changes of parameters that divide the output by ``scale`` fp32 [K] (equal on tied channels), but for readers."""
        divisor = scale[: self.units]
        if self.kind == "plain":
            changes: list[Change] = [(self.module, "weight", lambda w: w / divisor)]
        else:
            changes = [(self.module, "weight", lambda w: (1 + w) / divisor - 1)]
        if self.module._parameters.get("bias") is not None:
            changes.append((self.module, "bias", lambda b: b / divisor))
        return changes + [(module, name, lambda w: w * scale) for module, name in self.readers]

    def effective_scale(self, scale: Tensor) -> Tensor:
        """What the norm really divides by once its new weight is rounded to its dtype: the columns then compensate exactly.

        Where that is no usable number (weight 0, underflow) the wanted scale stays.
        """
        offset = 0.0 if self.kind == "plain" else 1.0
        old = self.module.weight.detach().float() + offset
        new = combined(self.changes(scale))[self.module, "weight"].float() + offset
        effective = self.channels(old / new)
        # a rounded weight is off by half an ulp; more means that it left the normal range of its dtype
        usable = effective.isfinite() & ((effective / scale - 1).abs() < 0.5)
        return torch.where(usable, effective, scale)

    def trial(self) -> list[Change]:
        """Parameters to prove the fold with: those at hand or, where dividing them is not exact, others of about their size.

        (1 + w)/s - 1 is rounded to w's dtype; with gains 1 + w that are powers of two it is not.
        """
        if self.kind == "plain":
            return []

        def powers(w: Tensor) -> Tensor:
            gain = 1 + w
            # times origin.EXPONENTS and minus 1 these need at most 8 bits: -2^6 - 1 and 2^-6 - 1 are exact even in bfloat16
            size = gain.abs().clamp(2.0**-4, 2.0**4).log2().round()
            return torch.where(gain < 0, -1.0, 1.0) * 2.0**size - 1

        return [(self.module, "weight", powers)]


@dataclass(frozen=True)
class LinearFold:
    """An earlier Linear whose output rows take over 1/s; channel k of the group's input comes from its row ``rows[k]``."""

    module: nn.Linear
    rows: Tensor

    @property
    def units(self) -> int:
        """Factors that can be chosen freely: one an output row."""
        return self.module.out_features

    def channels(self, units: Tensor) -> Tensor:
        """Factors [N] of the rows -> factors of the group's input channels [K]."""
        return units[self.rows]

    def tie(self, scale: Tensor) -> Tensor:
        """``scale`` [..., K] with the geometric mean over channels that come from one row (query heads that share values)."""
        total = scale.new_zeros(*scale.shape[:-1], self.units).index_add_(-1, self.rows, scale.log())
        count = scale.new_zeros(self.units).index_add_(0, self.rows, torch.ones_like(self.rows, dtype=scale.dtype))
        return (total / count.clamp_min(1)).exp()[..., self.rows]

    def divisor(self, scale: Tensor) -> Tensor:
        """What each output row is divided by: fp32 [N], 1 for rows that do not reach the group."""
        return torch.ones(self.units, device=scale.device).index_put_((self.rows,), scale)

    def changes(self, scale: Tensor) -> list[Change]:
        """The changes of parameters that divide the rows by ``scale`` fp32 [K] (equal on tied channels)."""
        divisor = self.divisor(scale)
        changes: list[Change] = [(self.module, "weight", lambda w: w / divisor[:, None])]
        if self.module.bias is not None:
            changes.append((self.module, "bias", lambda b: b / divisor))
        return changes

    def effective_scale(self, scale: Tensor) -> Tensor:
        """The scale itself: rows are divided in fp32 before they are rounded to codes."""
        return scale

    def trial(self) -> list[Change]:
        """Parameters to prove the fold with: those at hand."""
        return []


Fold = NormFold | LinearFold
