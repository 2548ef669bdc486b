"""Weights that a model's first forward multiplies in place by powers of two, as transformers' RWKV does for half precision."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Rescaling:
    """Tells by which factor the weight of a Linear has been multiplied since this object was made.

    One row of each is remembered. A weight that changed otherwise than by a power of two counts as not multiplied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rows: Mapping[str, Tensor] = {
            name: module.weight[:1].detach().clone()
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, nn.Linear) and _has_values(module.weight)
        }

    @torch.no_grad()
    def factor(self, name: str, weight: Tensor) -> float:
        """Give the factor for the Linear called ``name``, whose weight is ``weight`` now; 1 for one that was not there."""
        before, now = self._rows.get(name), weight[:1]
        if before is None or before.shape != now.shape or torch.equal(before, now):
            return 1.0
        factor = float(now.abs().max() / before.abs().max())
        if not _is_power_of_two(factor) or not torch.equal(before * factor, now):
            return 1.0
        return factor


def _has_values(weight: Tensor) -> bool:
    return not is_lazy(weight) and not weight.is_meta and weight.is_floating_point()


def _is_power_of_two(value: float) -> bool:
    """Tell whether ``value`` is 2^k for an integer k, of either sign."""
    return math.isfinite(value) and math.frexp(value)[0] == 0.5
