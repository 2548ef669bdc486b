"""Read or map a safetensors file: its header, checked against the file, and tensors one at a time."""

from __future__ import annotations

import json
import math
import os
import stat
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats.packed import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

_LENGTH = 8  # bytes of the length of the header, which come first
_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_LARGEST = 2**63 - 1  # what torch counts elements with


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor. dtype: None for one that is not in DTYPES. begin, end: bytes in the file."""

    kind: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A safetensors file: ``tensors``, name -> Entry; :meth:`read` reads one, :meth:`map` maps one.

    Models are read and not mapped into memory. A process that touches mapped bytes which another has cut off is killed (SIGBUS),
    and the weights of a model would follow whatever is written into the file later. Only what is larger than memory is mapped.
    CheckpointError, with the path, for a file that is missing, no file, damaged, or not of the length that its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # not to wait for who writes into a named pipe
            self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        weakref.finalize(self, os.close, self._handle)
        found = os.fstat(self._handle)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is no file")
        self._state = (found.st_size, found.st_mtime_ns)
        self.tensors = self._entries(*self._header(found.st_size), found.st_size)

    def read(self, name: str) -> Tensor:
        """Read a tensor, to the CPU. CheckpointError where the file has changed, MemoryError where there is no room."""
        entry = self.tensors[name]
        if entry.dtype is None:
            raise CheckpointError(f"{self.path}: {name} has dtype {entry.kind}, which is not known here")
        try:
            made = torch.empty(entry.shape, dtype=entry.dtype)
        except RuntimeError:
            raise MemoryError(f"{self.path}: no memory for the {entry.end - entry.begin} bytes of {name}") from None
        raw = made.reshape(-1).view(torch.uint8)
        self._fill(memoryview(raw.numpy()), entry.begin)
        self._check_unchanged()
        if entry.dtype == torch.bool:
            raw.clamp_(max=1)  # a bool of 2 is none, and what C++ does with it is open
        return made

    def map(self, name: str) -> Tensor:
        """Map a tensor into memory, on the CPU. What is written to it stays in memory: the file does not change.

        CheckpointError where the file has changed.
        """
        entry = self.tensors[name]
        if entry.dtype is None or entry.dtype == torch.bool or entry.begin == entry.end:
            return self.read(name)
        size, _ = self._state
        self._check_unchanged()
        whole = torch.from_file(os.fspath(self.path), shared=False, size=size, dtype=torch.uint8)
        part = whole[entry.begin : entry.end]
        # a view of numbers cannot begin between two of them; the library that writes these files aligns them
        part = part.clone() if entry.begin % entry.dtype.itemsize else part
        return part.view(entry.dtype).view(entry.shape)

    def _check_unchanged(self) -> None:
        now = os.fstat(self._handle)
        if (now.st_size, now.st_mtime_ns) != self._state:
            raise CheckpointError(f"{self.path} was changed while it was read: read it again")

    def _fill(self, target: memoryview, begin: int) -> None:
        """Read from ``begin`` until ``target`` is full."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._handle, [target[done:]], begin + done)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error}") from None
            if count == 0:
                raise CheckpointError(f"{self.path} ends too soon: it was cut short while it was read")
            done += count

    def _header(self, size: int) -> tuple[Mapping[str, Any], int]:
        """Read the JSON at the beginning; with it, where the bytes of the tensors begin."""
        if size < _LENGTH:
            raise self._damaged(f"{size} bytes are too few")
        start = bytearray(_LENGTH)
        self._fill(memoryview(start), 0)
        length = int.from_bytes(start, "little")
        if length > min(size - _LENGTH, _LONGEST_HEADER):
            raise self._damaged(f"a header of {length} bytes in a file of {size}")
        text = bytearray(length)
        self._fill(memoryview(text), _LENGTH)
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        except RecursionError:
            raise self._damaged("its header is nested too deep") from None
        except ValueError as error:
            raise self._damaged(f"its header is no JSON: {error}") from None
        if not isinstance(header, dict):
            raise self._damaged("its header is no object")
        header.pop("__metadata__", None)
        return header, _LENGTH + length

    def _entries(self, header: Mapping[str, Any], begin: int, size: int) -> dict[str, Entry]:
        """Check all entries: the tensors must fill the file from ``begin`` to its end, without gaps."""
        entries = {name: self._entry(name, said, begin) for name, said in header.items()}
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != begin:
                raise self._damaged(f"{name} does not begin where the tensor before it ends")
            begin = entry.end
        if begin != size:
            cut = next((f", in {name}" for name, entry in entries.items() if entry.begin <= size < entry.end), "")
            raise self._damaged(f"its tensors end at byte {begin}, the file at {size}{cut}")
        return entries

    def _entry(self, name: str, said: Any, begin: int) -> Entry:
        said = said if isinstance(said, dict) else {}
        kind, shape, offsets = said.get("dtype"), said.get("shape"), said.get("data_offsets")
        if not isinstance(kind, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
            raise self._damaged(f"the entry of {name} is no dtype, shape and data_offsets")
        length, dtype = offsets[1] - offsets[0], DTYPES.get(kind)
        # also of a tensor without elements torch multiplies the sizes
        if length < 0 or math.prod(max(each, 1) for each in shape) > _LARGEST:
            raise self._damaged(f"{name} has shape {shape} and data_offsets {offsets}")
        if dtype is not None and length != math.prod(shape) * dtype.itemsize:
            raise self._damaged(f"{name} has {length} bytes, shape {shape} of {kind} needs another number")
        return Entry(kind, dtype, tuple(shape), begin + offsets[0], begin + offsets[1])

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {reason}")


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each <= _LARGEST for each in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of what stands in an object; ValueError for a name that stands there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found
