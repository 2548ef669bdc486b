"""Uses: what the functions that a forward calls do with the parameters of fused experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .experts import MATMULS
from .fused import FusedWeight

# What ExpertLinears can answer as well as a tensor does.
_METADATA = ("shape", "dtype", "device")


class UseRecorder(TorchFunctionMode):
    """Sees what torch functions do with parameters: any tensor that lies in one's memory is known by its address."""

    def __init__(self, fused: Sequence[FusedWeight]) -> None:
        super().__init__()
        self._places = {f.name: (f.original.data_ptr(), f.original) for f in fused}
        self.uses: dict[str, list[str]] = {f.name: [] for f in fused}
        self.biased = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta":
                self._see(func, args, kwargs, tensor)
        return func(*args, **kwargs)

    def _see(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor) -> None:
        try:
            address = tensor.data_ptr()
        except RuntimeError:  # inside torch.vmap, whose tensors lie nowhere
            return
        for name, (start, parameter) in self._places.items():
            if start <= address < start + parameter.nbytes and parameter.device == tensor.device:
                if use := _use_of(func, args, kwargs, tensor, parameter):
                    self.uses[name].append(use)
                    self.biased |= use == "linear" and (args[2:] or (kwargs.get("bias"),))[0] is not None
                return


def _use_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor, parameter: nn.Parameter
) -> str:
    """One of USES, "" for what only looks, or words for anything else."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") in _METADATA:
        return ""
    second = args[1] if len(args) > 1 else kwargs.get("weight")
    if tensor.shape == parameter.shape:
        if name == "__getitem__":
            one = type(second) is int or (isinstance(second, Tensor) and second.dim() == 0)
            return "" if one else "several of its matrices are read at once"
        return "bmm" if name == "bmm" and second is tensor and len(args) == 2 else f"{name} uses all of it"
    if tensor.shape == parameter.shape[1:] and tensor.stride() == parameter.stride()[1:] and second is tensor:
        if func is F.linear:
            return "linear"
        if name in MATMULS:
            return "matmul"
    return f"{name} uses a part of it"
