"""Rows of experts, known again by hashes of their bits: a router hands them on without saying which tokens they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..forwards.hooks import Hooks
from ..forwards.inputs import tensor_identity
from .mixtures import Mixture

_HASHED_ROWS = 256


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


def row_tensors(value: Any) -> Iterator[tuple[int, Tensor]]:
    """The tensors in nested arguments whose rows an expert may read, each with its place among the leaves."""
    for place, leaf in enumerate(tree_leaves(value)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1:
            yield place, leaf


class ExpertHooks:
    """Hooks that see what the experts of mixtures are called with, and every tensor whose rows these may be."""

    def __init__(self, mixtures: Sequence[Mixture]) -> None:
        self.mixtures = mixtures

    @contextmanager
    def on(self, norms: Mapping[str, nn.Module]) -> Iterator[None]:
        """See what a forward in the body does. norms: those in it, by name. Experts that stay float are seen like the others."""
        with Hooks() as on:
            # one module may hold several mixtures
            for owner, module in {m.owner: m.modules[m.owner] for m in self.mixtures}.items():
                on.input(module, partial(self._owner_called, owner))
            for name, linear in {n: m for mixture in self.mixtures for n, m in mixture.linears.items()}.items():
                on.input(linear, partial(self._expert_called, name))
            for name, norm in norms.items() if self.mixtures else ():
                on.output(norm, partial(self._see_source, None, name))
            yield

    def _owner_called(self, owner: str, *inputs: Any) -> None:
        self._see_source(owner, "", inputs)

    def _expert_called(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")  # a class of the user's may call it something else
        self._see_rows(name, x if isinstance(x, Tensor) and x.is_floating_point() and x.dim() else None)

    def _see_source(self, owner: str | None, name: str, value: Any) -> None:
        """Before ``owner``, the module around some experts, is called with ``value``; or (None) once a norm returned it."""
        raise NotImplementedError

    def _see_rows(self, name: str, x: Tensor | None) -> None:
        """Before an expert's Linear is called with the rows of ``x``; None where its class hides them (it stays float)."""
        raise NotImplementedError
