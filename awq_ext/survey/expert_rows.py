"""Rows of experts, known again by hashes of their bits: a router hands them on without saying which tokens they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..forwards.inputs import tensor_identity

_HASHED_ROWS = 256


def expert_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a Linear of an expert was called with; None where its class calls it something else (it stays float)."""
    x = args[0] if args else kwargs.get("input")
    return x if isinstance(x, Tensor) and x.is_floating_point() and x.dim() else None


def row_hashes(x: Tensor) -> Tensor:
    """One int64 for each row of x [..., K]: equal for rows of equal bits, else different but for chance (2^-64 a pair)."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    bits = rows.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])
    generator = torch.Generator().manual_seed(rows.shape[1])
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator).to(rows.device) | 1
    # integers wrap around, so the order of the sum does not matter
    parts = [(part.to(torch.int64) * factors).sum(-1) for part in bits.split(_HASHED_ROWS)]
    return torch.cat(parts) if parts else bits.new_empty(0, dtype=torch.int64)


@dataclass
class RowSource:
    """A tensor (one a call) whose rows experts may read."""

    identities: list[tuple[Any, ...]] = field(default_factory=list)
    width: int = 0
    hashes: list[Tensor] = field(default_factory=list)

    def add(self, tensor: Tensor) -> None:
        self.identities.append(tensor_identity(tensor))
        self.width = tensor.shape[-1]
        self.hashes.append(row_hashes(tensor))
