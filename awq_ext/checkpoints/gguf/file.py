"""Write quantized layers and float tensors as one GGUF file, and read such a file under the model's own names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...reporting.warn import warn
from ..formats import CheckpointError, PackedLinear, Summary
from ..formats.runtimes.gguf import BLOCK, Q4_1, Q8_0, SIZES, Gguf, block_type, whole_zeros
from ..shards import by_module
from . import tokenizers
from .architectures import Architecture, gguf

GGUF = "model.gguf"
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KINDS = {dtype: kind for kind, dtype in _FLOATS.items()}


def foreseen(source: Any, config: Mapping[str, Any]) -> Architecture:
    """Check that every tensor has a name in GGUF; CheckpointError that names the first which has none."""
    known = Architecture(config)
    modules = known.modules()
    for name in (*source.layers, *(name.rpartition(".")[0] for name in source.floats)):
        if name not in modules:
            raise CheckpointError(f"llama.cpp's {known.name} has no tensor for {name}: use another format")
    return known


def write_gguf(folder: Path, source: Any, layout: Gguf, summary: Summary, config: Mapping[str, Any]) -> None:
    """Write ``source`` to model.gguf in ``folder``, with the tokenizer that lies there; one layer at a time is in memory."""
    package, known = gguf(), foreseen(source, config)
    writer = _described(known)
    kinds = [block_type(facts.bits, facts.symmetric) for facts in summary.layers.values()]
    usual = max(sorted(set(kinds)), key=kinds.count)
    writer.add_file_type(package.LlamaFileType[f"MOSTLY_{usual}"])
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    tokenizers.describe(folder, writer, config["vocab_size"])
    entries = list(_entries(source, known, summary))
    for name, shape, kind, _ in entries:
        nbytes = int(np.prod(shape)) * (1 if kind in SIZES else _FLOATS[kind].itemsize)
        element = np.dtype(np.uint8 if kind in SIZES else np.float32)
        writer.add_tensor_info(name, shape, element, nbytes, raw_dtype=package.GGMLQuantizationType[kind])
    writer.write_header_to_file(folder / GGUF)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    bias: Tensor | None = None
    for name, _, kind, made_of in entries:
        if made_of is None:  # of the layer before
            tensor = bias
        elif kind in SIZES:
            packed = _reordered(source.layer(made_of), known.rows(made_of, summary.layers[made_of].out_features))
            tensors = layout.pack(packed)
            tensor, bias = tensors["blocks"].flatten(1), tensors.get("bias")
        else:
            tensor = _float(source, known, made_of) if name != "rope_freqs.weight" else known.tensors()[name]
        writer.write_tensor_data(_array(tensor.to(_FLOATS[kind]) if kind in _FLOATS else tensor))
    writer.close()


def _described(known: Architecture) -> Any:
    """Make a writer (gguf.GGUFWriter) that has the metadata of the model, but no file."""
    writer = gguf().GGUFWriter(None, known.name)
    known.describe(writer)
    return writer


def _entries(
    source: Any, known: Architecture, summary: Summary
) -> Iterator[tuple[str, tuple[int, ...], str, str | None]]:
    """List the tensors to write: name, shape (of blocks: bytes of a row), type, and what of ``source`` they are made of."""
    modules = known.modules()
    for name in source.floats:
        module, _, leaf = name.rpartition(".")
        shape, dtype = source.shape(name), source.dtype(name)
        # llama.cpp adds and multiplies vectors in float32 only
        kind = "F32" if len(shape) == 1 or dtype not in _KINDS else _KINDS[dtype]
        yield f"{modules[module]}.{leaf}", shape, kind, name
    for name, tensor in known.tensors().items():
        yield name, tuple(tensor.shape), "F32", name
    for name, facts in summary.layers.items():
        kind = block_type(facts.bits, facts.symmetric)
        yield f"{modules[name]}.weight", (facts.out_features, facts.in_features // BLOCK * SIZES[kind]), kind, name
        if source.outline(name).bias is not None:
            yield f"{modules[name]}.bias", (facts.out_features,), "F32", None


def _float(source: Any, known: Architecture, name: str) -> Tensor:
    tensor, module = source.float_tensor(name), name.rpartition(".")[0]
    rows = known.rows(module, tensor.shape[0])
    return tensor.cpu() if rows is None else tensor.cpu()[rows]


def _reordered(layer: PackedLinear, rows: Tensor | None) -> PackedLinear:
    if rows is None:
        return layer
    bias = None if layer.bias is None else layer.bias[rows]
    return replace(layer, qweight=layer.qweight[rows], scales=layer.scales[rows], zeros=layer.zeros[rows], bias=bias)


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


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
        self._vectors = next((dtype for dtype in _KINDS if str(dtype) == f"torch.{named}"), torch.float32)
        file = (folder / GGUF).resolve()  # a link, of a file that is read by itself
        # what transformers computes from the config, by its name in the file: as it is there, and as it should be
        self.computed: dict[str, tuple[Tensor, Tensor]] = {}
        computed = self._known.tensors()
        names = {there: name for name, there in self._known.modules().items()}
        self._home: dict[str, tuple[str, Any]] = {}
        odd: list[str] = []
        reader = opened(file)
        self._said = reader.fields
        for tensor in reader.tensors:
            if tensor.name in computed:
                self.computed[tensor.name] = (torch.from_numpy(np.array(tensor.data)), computed[tensor.name])
                continue
            there, _, leaf = tensor.name.rpartition(".")
            kind = tensor.tensor_type.name
            if there not in names or not (kind in SIZES or kind in _FLOATS or _can_dequantize(tensor)):
                raise CheckpointError(
                    f"{file}: {tensor.name} ({kind}) is not known; types that can be read: {', '.join((*SIZES, *_FLOATS))}, and "
                    "those that the gguf package dequantizes"
                )
            held = kind in _FLOATS or (kind in SIZES and leaf == "weight" and _whole_zeros(tensor))
            if not held:
                odd.append(f"{tensor.name} ({kind})")
            quantized = held and kind in SIZES
            self._home[f"{names[there]}.{'blocks' if quantized else leaf}"] = (kind if held else "", tensor)
        if not any(kind in SIZES for kind, _ in self._home.values()):
            kinds = ", ".join(sorted({tensor.tensor_type.name for _, tensor in self._home.values()}))
            raise CheckpointError(
                f"{file} has no layer of Q4_0, Q8_0, or Q4_1 with whole zeros, only {kinds}: load it with transformers "
                "(from_pretrained(FOLDER, gguf_file=FILE)), which makes a float model of it"
            )
        if odd:
            more = f" and {len(odd) - 8} more" if len(odd) > 8 else ""
            warn(f"{file}: dequantized to floats, as no layer here holds such blocks: {', '.join(odd[:8])}{more}")

    def metadata_difference(self) -> str:
        """Say what of the metadata is not what the config asks for, the tokenizer's apart; "" where all of it is."""
        (wanted,) = _described(self._known).kv_data
        for key, value in wanted.items():
            if key not in self._said:
                return f"{key} is missing"
            found = self._said[key].contents()
            number = value.type == gguf().GGUFValueType.FLOAT32
            if found != (float(np.float32(value.value)) if number else value.value):
                return f"{key} is {str(found)[:80]!r}, not {str(value.value)[:80]!r}"
        return ""

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def dtype(self, name: str) -> torch.dtype:
        """Tell the dtype: uint8 of blocks; of vectors, which GGUF has in float32 alone, that of the config."""
        kind, tensor = self._home[name]
        if not kind or (kind == "F32" and len(tensor.shape) == 1):
            return self._vectors
        return _FLOATS.get(kind, torch.uint8)

    def bits(self, layer: str) -> int:
        """Tell the width of a quantized layer's codes."""
        return 8 if self._home[f"{layer}.blocks"][0] == Q8_0 else 4

    def shape(self, name: str) -> tuple[int, ...]:
        """Tell the shape."""
        kind, tensor = self._home[name]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return shape if kind not in SIZES else (shape[0], shape[1] // BLOCK, SIZES[kind])

    def home(self, name: str) -> str:
        """Name the file that has a tensor."""
        return GGUF

    def get(self, name: str) -> Tensor:
        """Read a tensor, to the CPU."""
        return self.stored(name).to(self.dtype(name))

    def stored(self, name: str) -> Tensor:
        """Read a tensor, to the CPU, in the dtype that the file has: float32 of vectors."""
        kind, tensor = self._home[name]
        if kind:
            data = torch.from_numpy(np.array(tensor.data)).view(_FLOATS.get(kind, torch.uint8))
        else:
            data = torch.from_numpy(gguf().dequantize(tensor.data, tensor.tensor_type))
        data = data.view(self.shape(name))
        rows = self._known.rows(name.rpartition(".")[0], data.shape[0], back=True)
        return data if rows is None else data[rows]

    def leaves(self, names: Iterable[str] | None = None) -> dict[str, dict[str, str]]:
        """Sort the tensors, or those ``names``, by module: see :func:`by_module`."""
        return by_module(self if names is None else names)
