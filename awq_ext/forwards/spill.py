"""Hidden states on the disk while their batch waits: the memory behind the very tensors becomes a file that is mapped.

The suspended forward and its frames hold the same tensors as before, so its code needs no change, and no bit of them does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import mkstemp
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Less than that is not worth a file.
_LEAST = 1 << 16


def can_spill() -> bool:
    """Tell whether files can be removed while they are mapped, and how often a storage is used can be asked."""
    return os.name == "posix" and hasattr(torch._C, "_storage_Use_Count")


def mapped_copy(tensor: Tensor, folder: Path) -> Tensor:
    """Copy a tensor to a file in ``folder`` that is mapped into memory, and that vanishes with the copy.

    OSError where the disk is full: the space is taken before anything is written, as a full disk would end the process otherwise.
    """
    handle, name = mkstemp(prefix="spilled-", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, tensor.nbytes)
        else:
            os.truncate(handle, tensor.nbytes)
        flat = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        os.close(handle)
        os.unlink(name)
    return flat.view(tensor.shape).copy_(tensor.detach())


def spill(values: Any, folder: Path) -> None:
    """Move large tensors among nested ``values`` to files in ``folder``, where nothing else holds their memory."""
    for tensor in _once(leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)):
        if _is_worth_it(tensor):
            tensor.data = mapped_copy(tensor, folder)


def _once(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _is_worth_it(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.nbytes < _LEAST or tensor.is_inference():
        return False
    if tensor.requires_grad or not tensor.is_contiguous() or tensor._base is not None:
        return False
    storage = tensor.untyped_storage()
    # two users are the tensor and this storage object: a view would go on to show, and to write, the memory of before
    return storage.nbytes() == tensor.nbytes and storage.filename is None and _users(storage) == 2


def _users(storage: torch.UntypedStorage) -> int:
    return torch._C._storage_Use_Count(storage._cdata)
