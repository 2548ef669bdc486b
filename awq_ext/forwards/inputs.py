"""What modules are called with: copies of it, its size, and which tensors are the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def copy_inputs(value: Any) -> Any:
    """Copies of arguments, so that code that works in place cannot reach the real ones: one copy of each tensor.

    Objects that hold tensors (key/value caches) are copied with what they hold; modules and parameters are shared.
    """
    copies: dict[int, Any] = {}
    return tree_map(lambda leaf: _copy_leaf(leaf, copies), value)


def _copy_leaf(leaf: Any, copies: dict[int, Any]) -> Any:
    if id(leaf) in copies:
        return copies[id(leaf)]
    if isinstance(leaf, Tensor):
        copies[id(leaf)] = leaf if isinstance(leaf, nn.Parameter) else leaf.clone()
    elif isinstance(leaf, (nn.Module, type)) or callable(leaf) or not hasattr(leaf, "__dict__"):
        return leaf
    else:
        try:
            copied = copy.copy(leaf)
        except Exception:  # what cannot be copied (locks, handles) is shared
            return leaf
        copies[id(leaf)] = copied  # before its attributes: they may refer back to it
        for name, held in vars(copied).items():
            vars(copied)[name] = tree_map(lambda inner: _copy_leaf(inner, copies), held)
    return copies[id(leaf)]


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested arguments."""
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def tensor_identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors exactly when they are the same values in the same memory at the same moment of its history.

    Contiguous ones may differ in shape: a view [batch * sequence, K] is its base [batch, sequence, K], and [batch, sequence,
    heads, K / heads] too.
    """
    version = None if tensor.is_inference() else tensor._version
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.dtype, version)
    if tensor.is_contiguous():
        return (*place, tensor.numel())
    return (*place, tuple(tensor.shape), tensor.stride())


def linear_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a Linear was called with, by position or by name."""
    return args[0] if args else kwargs["input"]
