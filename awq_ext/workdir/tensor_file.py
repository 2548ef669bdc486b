"""Tensors in one safetensors file that appears whole or not at all, and that is mapped into memory when it is read.

Every tensor begins at a multiple of 64 bytes, as those that torch allocates do: kernels may choose by the address how they round.
Such a file holds each tensor as flat bytes; dtypes and shapes are in its metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_ALIGNMENT = 64  # bytes
_ENTRY = "awq_ext"  # of the file's metadata: all that is not bytes


class DamagedFileError(RuntimeError):
    """A file of a work directory that cannot be read."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file that takes the place of ``path`` once it is on the disk, the directory's entry included.

    Whatever ends this early, a power cut included, leaves the file that was there before, or none. OSError for a full disk.
    """
    fresh = path.with_name(f"{path.name}.new")
    try:
        with open(fresh, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    _flush_entry(path.parent)


def _flush_entry(folder: Path) -> None:
    if os.name != "posix":  # directories cannot be opened elsewhere
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], values: Any) -> None:
    """Write tensors, from any device, and ``values``, which JSON can hold, to one file, atomically."""
    write_atomically(path, lambda file: _write(file, tensors, values))


def _write(file: IO[bytes], tensors: Mapping[str, Tensor], values: Any) -> None:
    kinds = {name: [str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {_ENTRY: json.dumps({"kinds": kinds, "values": values})}}
    end = 0
    for name, tensor in tensors.items():
        size = tensor.nbytes + -tensor.nbytes % _ALIGNMENT
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        file.write(memoryview(flat.numpy()))
        file.write(b"\0" * (-tensor.nbytes % _ALIGNMENT))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Map a file of :func:`write_tensors` into memory: its tensors, on the CPU, and its values.

    The tensors may be written to, which the file does not see. DamagedFileError for a file that is none of them, or not whole.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            told = json.loads((opened.metadata() or {})[_ENTRY])
            found = {name: _tensor(opened.get_tensor(name), *kind) for name, kind in told["kinds"].items()}
            return found, told["values"]
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from None


def _tensor(flat: Tensor, dtype: str, shape: list[int]) -> Tensor:
    kind = getattr(torch, dtype)
    count = torch.Size(shape).numel()
    return flat[: count * kind.itemsize].view(kind).view(shape)
