"""Read back a directory that has just been written, and compare it with what it was made from, one layer at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..formats import CheckpointError, PackedLinear
from ..gguf.file import GGUF, GgufTensors
from ..quantized_dir import CONFIG, QuantDir
from ..shards import Shards, read_json
from .parts import Part

_BYTES_AT_ONCE = 1 << 24  # of two tensors that differ, to find where: a multiple of every item's size
_METADATA = {"format": "pt"}  # without which transformers refuses a safetensors file


class VerificationError(CheckpointError):
    """A directory that does not read back as what it was made from; what was at its place before is still there."""


def verify(folder: Path, directory: Path, parts: Iterable[Part], texts: Mapping[str, str]) -> None:
    """Raise VerificationError unless ``folder``, which is to become ``directory``, holds ``parts`` and ``texts``, and no more.

    parts: made once more from the source, so that one layer at a time is in memory. Each tensor has the same bits (vectors
    of GGUF in float32), and each layer that a reader makes of them the same codes, scales, zeros and scale of its input.
    texts: content of JSON files by name. Metadata of a GGUF file: see ``GgufTensors.metadata_difference``. Not compared: the
    report, the card, and the tokenizer's own files.
    The bytes come from the disk where the system lets go of what it holds of files in memory (Linux).
    """
    try:
        _let_go(folder)
        _Check(folder).all(parts, texts)
    except (CheckpointError, SafetensorError, UnicodeDecodeError) as error:
        said = str(error).replace(str(folder), str(directory))
        raise VerificationError(
            f"{said}\nwhat was written does not read back as it should; {directory} is as it was. Write again; if it comes back, "
            "test the disk and the memory"
        ) from None


def _let_go(folder: Path) -> None:
    """Put files on the disk and out of the system's memory, from which they would be read back instead."""
    for file in folder.iterdir():
        if not file.is_file() or not hasattr(os, "posix_fadvise"):
            continue
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # what is not on the disk yet stays in memory
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


class _Check:
    """The comparison of one directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: QuantDir | None = None
        try:
            self.written = QuantDir(folder)
            self.stored = self.written.shards
        except CheckpointError as error:
            self.unread = error  # raised where comparing the tensors finds nothing that says more
            self.stored = self._tensors_alone()

    def _tensors_alone(self) -> Shards | GgufTensors:
        """Open the files where config.json or what is missing in them makes them no checkpoint."""
        if (self.folder / GGUF).exists():
            return GgufTensors(self.folder, read_json(self.folder / CONFIG))
        return Shards(self.folder)

    def all(self, parts: Iterable[Part], texts: Mapping[str, str]) -> None:
        known: set[str] = set()
        layers: set[str] = set()
        for part in parts:
            known |= part[2].keys()
            layers.add(part[0])
            self.same_part(*part)
            del part  # before the next one is made
        for name in self.stored:
            if name not in known:
                raise self.wrong(name, "is in the file, but was not to be written")
        if self.written is None:
            raise self.unread
        for name in self.written.layers:
            if name not in layers:
                raise CheckpointError(f"{self.folder}: layer {name} reads as quantized, but is float")
        for name, (there, made) in self.stored.computed.items() if isinstance(self.stored, GgufTensors) else ():
            if difference := _difference(there, made):
                raise CheckpointError(f"{self.folder / GGUF}: {name} {difference}")
        self.same_texts(texts)
        if isinstance(self.stored, GgufTensors) and (difference := self.stored.metadata_difference()):
            raise CheckpointError(f"{self.folder / GGUF}: {difference}")

    def same_part(self, name: str, layer: PackedLinear | None, tensors: Mapping[str, Tensor]) -> None:
        read = {full: self.same(full, tensor, name) for full, tensor in tensors.items()}
        if layer is not None and self.written is not None:
            self.same_layer(name, layer, read)

    def wrong(self, name: str, what: str, layer: str = "") -> CheckpointError:
        file = self.folder / self.stored.home(name) if name in self.stored else self.folder
        return CheckpointError(f"{file}: {name}{f' of layer {layer}' if layer else ''} {what}")

    def same(self, name: str, made: Tensor, layer: str) -> Tensor:
        """Read one tensor, and require the bits of what was made for it."""
        if name not in self.stored:
            raise self.wrong(name, "is in no file", layer)
        # floats are mapped: an embedding can be larger than what a run has left, and nobody else knows this folder yet
        get = self.stored.map if not layer and isinstance(self.stored, Shards) else self.stored.stored
        there, made = get(name), made.detach().to("cpu")
        if isinstance(self.stored, GgufTensors):
            made = self.stored.as_read(name, made)
        if difference := _difference(there, made):
            raise self.wrong(name, difference, layer)
        return there

    def same_layer(self, name: str, made: PackedLinear, read: Mapping[str, Tensor]) -> None:
        """Require that a reader, who goes by config.json, makes the same layer of its tensors."""
        assert self.written is not None
        if name not in self.written.layers:
            raise CheckpointError(f"{self.folder}: layer {name} does not read as quantized")
        leaves = {leaf: read[full] for leaf, full in self.written.layers[name].items() if full in read}
        again = self.written.layer(name, leaves)
        for what, difference in _layer_differences(again, made):
            if difference:
                raise CheckpointError(f"{self.folder}: layer {name}: {what} {difference}")

    def same_texts(self, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            if (self.folder / name).read_text(encoding="utf-8") != text:
                raise CheckpointError(f"{self.folder / name} has another content than was written")
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                if opened.metadata() != _METADATA:
                    raise CheckpointError(f"{file} has the metadata {opened.metadata()}, not {_METADATA}")


def _difference(there: Tensor, made: Tensor) -> str:
    """Say how two tensors on the CPU differ; "" where shape, dtype and all bits are the same."""
    for what, a, b in (("shape", tuple(there.shape), tuple(made.shape)), ("dtype", there.dtype, made.dtype)):
        if a != b:
            return f"has {what} {a} in the file, not {b}"
    # bytes: NaN is not equal to itself, and -0 is equal to 0
    a, b = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (there, made))
    if torch.equal(a, b):
        return ""
    size, count, first = there.dtype.itemsize, 0, -1
    for start in range(0, len(a), _BYTES_AT_ONCE):
        part = slice(start, start + _BYTES_AT_ONCE)
        odd = (a[part] != b[part]).view(-1, size).any(1).nonzero()[:, 0]
        first = start // size + int(odd[0]) if first < 0 and len(odd) else first
        count += len(odd)
    place = [int(index) for index in torch.unravel_index(torch.tensor(first), there.shape)]
    found, wanted = (tensor.reshape(-1)[first].item() for tensor in (there, made))
    return (
        f"differs in {count:,} of {there.numel():,} values, first at {place}: {found} in the file, {wanted} in memory"
    )


def _layer_differences(there: PackedLinear, made: PackedLinear) -> Iterable[tuple[str, str]]:
    """Compare what two layers compute with, one part after the other: its name, and what differs, or ""."""
    for what in ("in_features", "out_features", "bits", "rescaled"):
        a, b = getattr(there, what), getattr(made, what)
        yield what, "" if a == b else f"reads as {a}, not {b}"
    groups = _groups(there, made)
    if groups == 0:
        sizes = f"{there.groups} groups of {there.group_size}, not {made.groups} of {made.group_size}"
        yield "scales", f"read as {sizes}"
    same = torch.equal(there.qweight, made.qweight)  # else what fills up the last byte of a row may differ
    yield "codes", "" if same else _difference(there.codes(), made.codes())
    for what in ("scales", "zeros"):
        values = getattr(made, what).repeat_interleave(groups, 1)
        yield what, _difference(getattr(there, what).double(), values.double())
    for what in ("bias", "pre_quant_scale"):
        a, b = getattr(there, what), getattr(made, what)
        if a is None or b is None:
            yield what, "" if a is b else "is read, but there is none" if b is None else "is there, but is not read"
        elif what == "pre_quant_scale":  # bits of the bias were compared as they are stored
            yield what, _difference(a.double(), b.double())


def _groups(there: PackedLinear, made: PackedLinear) -> int:
    """Count the groups that were read for each that was made: several where blocks have one size; 0 if they do not fit."""
    if there.groups == made.groups:
        return int(there.groups == 1 or there.group_size == made.group_size)
    whole = there.groups % made.groups == 0 and made.in_features % there.groups == 0
    return there.groups // made.groups if whole else 0
