"""ExpertLinears: the experts of one fused parameter as Linears, behind what indexing the parameter gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# How a forward may use a fused weight W: F.linear(x, W[e]), x @ W[e], torch.bmm(x, W).
USES = ("linear", "matmul", "bmm")
MATMULS = ("matmul", "__matmul__", "mm")
# Why what chooses among experts stays float: a token that goes to another one is no rounding error.
ROUTER = "router of experts"


class ExpertLinears(nn.ModuleList):
    """The experts of one fused parameter, a Linear without bias each, under the parameter's name.

    ``self[e]`` for an int or a 0-d tensor stands for the expert's weight: torch.nn.functional.linear(x, self[e]) (``use`` "linear")
    or x @ self[e] ("matmul") runs its module, whatever that is by then; so does torch.bmm(x, self) with all of them ("bmm").
    shape, dtype and device are those of the parameter. Anything else raises TypeError.
    """

    def __init__(self, linears: Sequence[nn.Module], use: str) -> None:
        super().__init__(linears)
        self.use = use

    def __getitem__(self, index: Any) -> _Expert:
        if isinstance(index, slice):
            raise TypeError("these experts are modules by now: index them one by one")
        return _Expert(super().__getitem__(int(index)), self.use)

    @property
    def shape(self) -> torch.Size:
        """[E, N, K], or [E, K, N] where x is multiplied by the weight itself."""
        first = next(self.children())
        sizes = (first.out_features, first.in_features)
        return torch.Size((len(self), *(sizes if self.use == "linear" else sizes[::-1])))

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return _dtype(next(self.children()))

    @property
    def device(self) -> torch.device:
        """That of the weights."""
        return _device(next(self.children()))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "bmm" and len(args) == 2 and not kwargs and args[1].use == "bmm":
            x, experts = args
            return torch.stack([expert(rows) for expert, rows in zip(experts.children(), x, strict=True)])
        raise TypeError(_refusal(func))


class _Expert:
    """What indexing ExpertLinears gives: stands for a weight in the one function that the model uses it in."""

    def __init__(self, module: nn.Module, use: str) -> None:
        self._module = module
        self._use = use

    @property
    def shape(self) -> torch.Size:
        sizes = (self._module.out_features, self._module.in_features)
        return torch.Size(sizes if self._use == "linear" else sizes[::-1])

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self._module)

    @property
    def device(self) -> torch.device:
        return _device(self._module)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        expert, x, bias = named.get("weight"), named.get("input"), named.get("bias")
        fits = isinstance(expert, cls) and isinstance(x, Tensor)
        if fits and func is F.linear and expert._use == "linear":
            output = expert._module(x)
            return output if bias is None else output + bias
        if fits and getattr(func, "__name__", "") in MATMULS and len(named) == 2 and expert._use == "matmul":
            return expert._module(x)
        raise TypeError(_refusal(func))

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self.__torch_function__(torch.matmul, (), (x, self))


def expert_count(model: nn.Module, name: str) -> int | None:
    """How many experts ``model`` holds in the parameter (or, by now, ExpertLinears) of this name; None if there is none."""
    parent, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        return None
    held = module._parameters.get(leaf, module._modules.get(leaf))
    return None if held is None else len(held)


def _dtype(module: nn.Module) -> torch.dtype:
    return getattr(module, "dtype", None) or module.weight.dtype


def _device(module: nn.Module) -> torch.device:
    return next((*module.parameters(), *module.buffers())).device


def _refusal(func: Callable[..., Any]) -> str:
    return (
        f"{getattr(func, '__name__', func)} cannot use experts that were taken apart; it was not seen in the first calibration "
        "batch (an implementation of the experts that was switched since? They run one by one)"
    )
