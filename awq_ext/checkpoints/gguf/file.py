"""Read a GGUF file under the model's own names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...reporting.warn import warn
from ..formats import CheckpointError
from ..formats.runtimes.gguf import BLOCK, Q4_1, Q8_0, SIZES, whole_zeros
from ..shards import by_module
from . import tokenizers
from .architecture import CORRECTION, Architecture, Place, gguf, module_of, whole

GGUF = "model.gguf"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KINDS = {dtype: kind for kind, dtype in FLOATS.items()}


def described(known: Architecture) -> Any:
    """Make a writer (gguf.GGUFWriter) that has the metadata of the model, but no file."""
    writer = gguf().GGUFWriter(None, known.name)
    known.describe(writer)
    return writer


def opened(file: Path) -> Any:
    """Open a GGUF file (gguf.GGUFReader); CheckpointError for a damaged one."""
    package = gguf()
    try:
        return package.GGUFReader(file)
    except Exception as error:  # of a reader that trusts the file
        raise CheckpointError(f"{file} is damaged: {error}") from None


def kinds_in(file: Path) -> list[tuple[str, int]]:
    """List type and number of weights of each tensor in a GGUF file; CheckpointError for a damaged one."""
    return [(tensor.tensor_type.name, int(tensor.n_elements)) for tensor in opened(file).tensors]


def _can_dequantize(tensor: Any) -> bool:
    try:
        # of one row: whether there is a function at all
        gguf().dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def _whole_zeros(tensor: Any) -> bool:
    """Tell whether blocks are of integers: of Q4_1, whether all offsets are whole multiples of the scale."""
    if tensor.tensor_type.name != Q4_1:
        return True
    halves = torch.from_numpy(np.array(tensor.data)).unflatten(-1, (-1, SIZES[Q4_1]))[..., :4].contiguous()
    return whole_zeros(*halves.view(torch.float16).unbind(-1))


def _first_difference(key: str, found: Any, made: list[Any]) -> str:
    if not isinstance(found, list) or len(found) != len(made):
        return f"{key} has another length than {len(made)}"
    place = next(i for i, pair in enumerate(zip(found, made, strict=True)) if pair[0] != pair[1])
    return f"{key}[{place}] is {str(found[place])[:80]!r}, not {str(made[place])[:80]!r}"


def _require_experts(file: Path, tensor: Any, places: list[tuple[str, Place]]) -> None:
    """Refuse a tensor that has other experts than the config says."""
    experts = sum(place.expert is not None for _, place in places)
    if experts and (len(tensor.shape) != 3 or int(tensor.shape[2]) != experts):
        raise CheckpointError(
            f"{file}: {tensor.name} has shape {tuple(map(int, tensor.shape))}, {experts} experts are needed"
        )


class GgufTensors:
    """The tensors of model.gguf in ``folder`` under the names of the model, as Shards has those of safetensors files.

    Of a quantized layer: blocks uint8 [N, K/32, B], see ``Gguf``. Rows are in the model's order. Weights of other blocks (Q6_K, and
    Q4_1 with offsets between codes), which no layer of ints can hold exactly, are dequantized to floats, as a warning says.
    CheckpointError for a damaged file, for tensors that the architecture has no name for, for types that the gguf package cannot
    dequantize, and for a file without any layer of Q4_0, Q4_1 or Q8_0.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self._known = folder, Architecture(config)
        named = str(config.get("dtype") or config.get("torch_dtype"))
        self._vectors = next((dtype for dtype in KINDS if str(dtype) == f"torch.{named}"), torch.float32)
        file = (folder / GGUF).resolve()  # a link, of a file that is read by itself
        # what transformers computes from the config, by its name in the file: as it is there, and as it should be
        self.computed: dict[str, tuple[Tensor, Tensor]] = {}
        # type, "" of one that becomes float; the tensor, or both of a module that is two there; which expert
        self._home: dict[str, tuple[str, list[Any], int | None]] = {}
        reader = opened(file)
        self._said = reader.fields
        odd = self._find(file, reader.tensors)
        if not any(kind in SIZES for kind, _, _ in self._home.values()):
            kinds = {tensor.tensor_type.name for _, tensors, _ in self._home.values() for tensor in tensors}
            raise CheckpointError(
                f"{file} has no layer of Q4_0, Q8_0, or Q4_1 with whole zeros, only {', '.join(sorted(kinds))}: load it with "
                "transformers (from_pretrained(FOLDER, gguf_file=FILE)), which makes a float model of it"
            )
        if odd:
            more = f" and {len(odd) - 8} more" if len(odd) > 8 else ""
            warn(f"{file}: dequantized to floats, as no layer here holds such blocks: {', '.join(odd[:8])}{more}")

    def _find(self, file: Path, tensors: Iterable[Any]) -> list[str]:
        """Note where all tensors are; list those that become floats."""
        computed, odd = self._known.tensors(), []
        names: dict[str, list[tuple[str, Place]]] = {}
        for name, place in self._known.places().items():
            names.setdefault(place.name, []).append((name, place))
        for tensor in tensors:
            if tensor.name in computed:
                self.computed[tensor.name] = (torch.from_numpy(np.array(tensor.data)), computed[tensor.name])
                continue
            there, _, leaf = tensor.name.rpartition(".")
            kind = tensor.tensor_type.name
            if there not in names or not (kind in SIZES or kind in FLOATS or _can_dequantize(tensor)):
                raise CheckpointError(
                    f"{file}: {tensor.name} ({kind}) is not known; types that can be read: {', '.join((*SIZES, *FLOATS))}, and "
                    "those that the gguf package dequantizes"
                )
            held = kind in FLOATS or (kind in SIZES and leaf == "weight" and _whole_zeros(tensor))
            if not held:
                odd.append(f"{tensor.name} ({kind})")
            _require_experts(file, tensor, names[there])
            ours = "blocks" if held and kind in SIZES else leaf
            # of experts in one tensor: that of all where it is float, else those of each
            both = {place.expert is None for _, place in names[there]} == {True, False}
            for name, place in names[there]:
                if not both or (place.expert is None) != (ours == "blocks"):
                    self._take(file, name, ours, (kind if held else "", [tensor], place.expert))
        return odd

    def _take(self, file: Path, part: str, leaf: str, found: tuple[str, list[Any], int | None]) -> None:
        """Note where a tensor is; of halves, the first comes first, whichever is first in the file."""
        name = whole(module_of(part), leaf)
        if name in self._home:
            before = self._home[name]
            if before[0] != found[0]:
                raise CheckpointError(f"{file}: {found[1][0].name} is of another type than {before[1][0].name}")
            both = [*before[1], *found[1]]
            found = (found[0], both if part.endswith("1") else both[::-1], found[2])
        self._home[name] = found

    def metadata_difference(self) -> str:
        """Say what of the metadata is not what the config and the tokenizer beside it ask for; "" where all of it is."""
        writer = described(self._known)
        tokenizers.describe(self.folder, writer, self._known.config, tell=False)
        (wanted,) = writer.kv_data
        for key, value in wanted.items():
            if key not in self._said:
                return f"{key} is missing"
            found, made = self._said[key].contents(), value.value
            if value.type == gguf().GGUFValueType.FLOAT32:
                made = float(np.float32(made))
            if isinstance(made, (list, tuple)) and found != list(made):
                return _first_difference(key, found, list(made))
            if not isinstance(made, (list, tuple)) and found != made:
                return f"{key} is {str(found)[:80]!r}, not {str(made)[:80]!r}"
        return ""

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def dtype(self, name: str) -> torch.dtype:
        """Tell the dtype: uint8 of blocks; of vectors, which GGUF has in float32 alone, that of the config."""
        kind, (tensor, *_), _ = self._home[name]
        if name.endswith(CORRECTION):
            return torch.float32
        if not kind or (kind == "F32" and (len(tensor.shape) == 1 or self._known.squeezed(name))):
            return self._vectors
        return FLOATS.get(kind, torch.uint8)

    def bits(self, layer: str) -> int:
        """Tell the width of a quantized layer's codes."""
        return 8 if self._home[f"{layer}.blocks"][0] == Q8_0 else 4

    def experts(self) -> dict[str, str]:
        """Name the parameters [E, N, K] of transformers whose matrices are layers, and how they are used, as ``native`` does."""
        found = (re.fullmatch(r"(.*\.weight)\.\d+\.blocks", name) for name in self._home)
        return {match[1]: "linear" for match in found if match}

    def shape(self, name: str) -> tuple[int, ...]:
        """Tell the shape."""
        shape = self._shape(name)
        if self._known.squeezed(name):
            return (shape[0], 1, shape[1])
        return shape[::-1] if self._known.transposed(name) else shape

    def _shape(self, name: str) -> tuple[int, ...]:
        kind, tensors, expert = self._home[name]
        shape = tuple(int(size) for size in reversed(tensors[0].shape))[0 if expert is None else 1 :]
        shape = shape if len(tensors) == 1 else (*shape[:-2], shape[-2] * len(tensors), shape[-1])
        return shape if kind not in SIZES else (shape[0], shape[1] // BLOCK, SIZES[kind])

    def home(self, name: str) -> str:
        """Name the file that has a tensor."""
        return GGUF

    def get(self, name: str) -> Tensor:
        """Read a tensor, to the CPU."""
        return self.stored(name).to(self.dtype(name))

    def stored(self, name: str) -> Tensor:
        """Read a tensor, to the CPU, in the dtype that the file has: float32 of vectors."""
        kind, tensors, expert = self._home[name]
        found = []
        for tensor in tensors:
            data = tensor.data if expert is None else tensor.data[expert]
            if kind:
                found.append(torch.from_numpy(np.array(data)).view(FLOATS.get(kind, torch.uint8)))
            else:
                found.append(torch.from_numpy(gguf().dequantize(data, tensor.tensor_type)))
        return self._known.here(name, (torch.cat(found, -2) if len(found) > 1 else found[0]).view(self._shape(name)))

    def as_read(self, name: str, made: Tensor) -> Tensor:
        """Give what :meth:`stored` must be where ``made`` was written: float32 of vectors, norms with what 1 + w lost."""
        if self._home[name][0] == "F32":
            made = made.to(torch.float32)
        return self._known.here(name, self._known.there(name, made)) if self._known.shift(name) else made

    def leaves(self, names: Iterable[str] | None = None) -> dict[str, dict[str, str]]:
        """Sort the tensors, or those ``names``, by module: see :func:`by_module`."""
        return by_module(self if names is None else names)
