"""A model's twin: modules of its own, the same matrices. What is quantized in place of a model that must stay as it is."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Twin:
    """A copy of a model that shares its matrices, and what tells if one was written."""

    module: nn.Module
    shared: tuple[tuple[str, Tensor, int | None], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Twin:
        """``quantize`` replaces Linears and writes only norms, biases and routers, so all but these can be shared.

        The copy takes little memory: vectors, routers, buffers, module objects. TypeError where ``copy.deepcopy`` fails.
        """
        counts = _expert_counts(model)
        matrices = {n: p for n, p in model.named_parameters() if p.dim() > 2 or (p.dim() == 2 and len(p) not in counts)}
        try:
            module = copy.deepcopy(model, {id(p): p for p in matrices.values()})
        except Exception as error:
            raise TypeError(
                f"{type(model).__name__} cannot be copied, and its own modules must stay as they are: "
                f"copy.deepcopy raised {type(error).__name__}: {error}"
            ) from error
        return cls(module, tuple((name, p, _version(p)) for name, p in matrices.items()))

    def check(self) -> None:
        """RuntimeError if a shared parameter was written since: a bug of this package, to be reported."""
        if written := [name for name, tensor, version in self.shared if _version(tensor) != version]:
            raise RuntimeError(f"a method wrote to {written[0]}, which belongs to the float model: please report this")


def _expert_counts(model: nn.Module) -> set[int]:
    """Lengths of what may be the experts of a layer: a router [E, K] makes up for the scale of the norm before it.

    Lists of blocks are among them; whatever else has so few rows takes no memory to speak of.
    """
    lists = {len(module) for module in model.modules() if isinstance(module, nn.ModuleList)}
    return lists | {len(p) for p in model.parameters() if p.dim() > 2}


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
