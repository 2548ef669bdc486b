"""Why activations matter, on one row of weights: what rounding each costs at the output, and what a scale does to it.

The weights and activations are chosen by hand; what becomes of them is computed by the package's own rounding and search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..config import AwqConfig
from ..solving.scales import search_scale

BITS = 3
WEIGHTS = (1.10, -0.60, 0.20, 0.75, -0.30, 0.40, -0.95, 0.50)
# mean |x| of each channel. The third is loud, as one channel in a hundred is in language models.
ACTIVATIONS = (0.5, 0.8, 20.0, 0.6, 0.4, 0.7, 0.5, 0.9)


@dataclass(frozen=True)
class Rounded:
    """Errors of a row after rounding: of each weight, fp32 [K], and what it costs, error x activation."""

    errors: Tensor
    costs: Tensor

    @property
    def total(self) -> float:
        """What all channels cost together."""
        return float(self.costs.sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"errors": self.errors.tolist(), "costs": self.costs.tolist(), "total": self.total}


@dataclass(frozen=True)
class Example:
    """One row rounded to nearest and by AWQ. scale fp32 [K]: what AWQ multiplies the weights by before they are rounded."""

    weights: Tensor
    activations: Tensor
    scale: Tensor
    rtn: Rounded
    awq: Rounded
    bits: int

    @property
    def loud(self) -> int:
        """The channel with the largest activations."""
        return int(self.activations.argmax())

    @property
    def quiet(self) -> int:
        """Of the other channels, the one whose weight has the largest error by RTN."""
        errors = self.rtn.errors.clone()
        errors[self.loud] = -1
        return int(errors.argmax())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        lists = {name: getattr(self, name).tolist() for name in ("weights", "activations", "scale")}
        parts = {"rtn": self.rtn.to_dict(), "awq": self.awq.to_dict()}
        return lists | parts | {"bits": self.bits, "loud": self.loud, "quiet": self.quiet}


def example() -> Example:
    """Round the row of ``WEIGHTS`` to ``BITS`` bits, one group, with and without the scale that AWQ's search finds."""
    weights, activations = torch.tensor(WEIGHTS), torch.tensor(ACTIVATIONS)
    config = AwqConfig(bits=BITS, packed=False, group_size=-1)
    moment = activations.square().diag()  # channels that do not depend on each other
    found = search_scale([weights[None]], activations, [moment], [config])
    scale = torch.ones_like(weights) if found.scale is None else found.scale
    rtn, awq = (_rounded(weights, activations, one) for one in (torch.ones_like(scale), scale))
    return Example(weights, activations, scale, rtn, awq, BITS)


def _rounded(weights: Tensor, activations: Tensor, scale: Tensor) -> Rounded:
    parts = kernels.quantize_weight(weights[None], -1, BITS, channel_scale=scale)
    stored = kernels.dequantize_weight(parts[0], parts[1].float(), parts[2], -1)[0] / scale
    errors = (stored - weights).abs()
    return Rounded(errors, errors * activations)
