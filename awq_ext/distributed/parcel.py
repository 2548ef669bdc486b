"""Parcels: named tensors and plain values as one uint8 tensor, to be sent.

Every tensor begins at a multiple of 64 bytes, as those that torch allocates do: kernels may choose by the address how they round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes


def pack(tensors: Mapping[str, Tensor], values: Any = None) -> Tensor:
    """Copy tensors, from any device, and ``values``, which JSON can hold, into one uint8 [n] on the CPU."""
    kinds = {name: [str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in tensors.items()}
    header = json.dumps({"kinds": kinds, "values": values}).encode()
    start = _aligned(8 + len(header))
    parcel = torch.empty(start + sum(_aligned(one.nbytes) for one in tensors.values()), dtype=torch.uint8)
    text = len(header).to_bytes(8, "little") + header
    parcel[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    for tensor in tensors.values():
        if tensor.numel():
            into = parcel[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            into.copy_(tensor.detach())
        start += _aligned(tensor.nbytes)
    return parcel


def unpack(parcel: Tensor) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a parcel, as views of it, and its values."""
    length = int.from_bytes(bytes(parcel[:8].tolist()), "little")
    told = json.loads(parcel[8 : 8 + length].numpy().tobytes())
    start, tensors = _aligned(8 + length), {}
    for name, (kind, shape) in told["kinds"].items():
        dtype = getattr(torch, kind)
        size = torch.Size(shape).numel() * dtype.itemsize
        tensors[name] = parcel[start : start + size].view(dtype).view(shape)
        start += _aligned(size)
    return tensors, told["values"]


def _aligned(size: int) -> int:
    return size + -size % _ALIGNMENT
