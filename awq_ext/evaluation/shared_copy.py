"""Copy a model without its matrices, to quantize the copy where the model must stay as it is."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class SharedCopy:
    """A copy of a model: modules of its own, shared matrices, and their versions, which tell if one was written."""

    module: nn.Module
    shared: tuple[tuple[str, Tensor, int | None], ...]

    @classmethod
    def of(cls, model: nn.Module) -> SharedCopy:
        """Copy ``model``, sharing all but what ``quantize`` writes: norms, biases and routers.

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
        """Raise RuntimeError if a shared parameter was written since: a bug of this package, to be reported."""
        if written := [name for name, tensor, version in self.shared if _version(tensor) != version]:
            raise RuntimeError(f"a method wrote to {written[0]}, which belongs to the float model: please report this")


def _expert_counts(model: nn.Module) -> set[int]:
    """Find how many experts a layer may have: a router is a matrix [experts, K], written to undo the scale of its norm.

    Lengths of lists of blocks are among the numbers; whatever else has so few rows takes little memory.
    """
    lists = {len(module) for module in model.modules() if isinstance(module, nn.ModuleList)}
    return lists | {len(p) for p in model.parameters() if p.dim() > 2}


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
