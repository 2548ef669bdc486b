"""FrozenTensor: a tensor that is computed on every access, and refuses writes because they would be lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

# Their names look like those of in-place operations, but they change no value.
_HARMLESS = {"requires_grad_", "detach_", "share_memory_", "__init__", "__invert__", "__int__", "__index__", "__iter__"}


class FrozenTensor(Tensor):
    """Tensor that reads like any other (results are plain Tensors), but cannot be written: in place, by ``.data`` or as ``out=``.

    A write raises RuntimeError. Otherwise what is written to a weight that is dequantized on every access would vanish silently:
    PEFT, for one, merges an adapter by ``layer.weight.data += delta``. An operation in place that changes no value loses nothing,
    and is let pass; so is a multiplication by ``rescaled``, which the weight has behind it (QuantLinear.rescaled).
    """

    rescaled = 1.0

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation on such a tensor, unless it writes to it."""
        named = dict(kwargs or {})
        if _writes(func, args, named):
            if _is_done(func, args, named):
                return args[0]
            raise RuntimeError(
                "the weight of a QuantLinear is a dequantized copy, and what is written to it would be lost: keep an adapter "
                "beside the layer (do not merge it), or merge it into the float model and quantize that again; where the model's "
                "own first forward writes, quantize the float model before it runs"
            )
        with DisableTorchFunctionSubclass():
            found = func(*args, **named)
        if func == Tensor.data.__get__:  # ``weight.data += delta`` writes to the data
            return found.as_subclass(cls)
        # float() and the like return the tensor itself where there is nothing to do
        return found.as_subclass(Tensor) if isinstance(found, cls) else found

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain Tensor, which any ``torch.load`` reads."""
        return self.clone().__reduce_ex__(protocol)


def _in_place(func: Callable[..., Any]) -> bool:
    """Tell by its name whether an operation changes its first argument."""
    name = getattr(func, "__name__", "")
    in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return name == "__setitem__" or (in_place and name not in _HARMLESS)


def _writes(func: Callable[..., Any], args: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Tell whether ``func`` would change a FrozenTensor among its arguments."""
    # the functions of torch.nn.init pass their tensor by keyword
    target = args[0] if args else named.get("tensor")
    if isinstance(named.get("out"), FrozenTensor):
        return True
    return isinstance(target, FrozenTensor) and (func == Tensor.data.__set__ or _in_place(func))


@torch.no_grad()
def _is_done(func: Callable[..., Any], args: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Try on a copy whether an operation in place leaves every value as it is, or multiplies all by ``rescaled``."""
    if not args or not _in_place(func) or isinstance(named.get("out"), FrozenTensor):
        return False
    with DisableTorchFunctionSubclass():
        copy = args[0].clone()
        func(copy, *args[1:], **named)
        return torch.equal(copy, args[0]) or torch.equal(copy, args[0] * args[0].rescaled)
