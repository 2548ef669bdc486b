"""Write quantized layers and float tensors as one GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..formats import CheckpointError, PackedLinear, Summary
from ..formats.runtimes.gguf import BLOCK, SIZES, Gguf, block_type
from . import tokenizers
from .architecture import CORRECTION, Architecture, gguf, parted
from .file import FLOATS, GGUF, KINDS, described


@dataclass(frozen=True)
class _Planned:
    """A tensor to write: shape (of blocks: bytes of a row), type, and what of the source it is made of, experts in their order.

    made_of: a float tensor's names, or those of layers; empty: what is computed from the config.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    made_of: tuple[str, ...] = ()
    stacked: bool = False


def foreseen(source: Any, config: Mapping[str, Any]) -> None:
    """Check that everything has a place in the file.

    CheckpointError that names the first tensor which has none, an output layer that is missing or too many, and experts that
    differ in type.
    """
    known = Architecture(config)
    places = known.places()
    modules = dict.fromkeys((*source.layers, *(parted(name)[0] for name in source.floats)))
    for name in modules:
        if name not in places:
            raise CheckpointError(f"llama.cpp's {known.name} has no tensor for {name}: use another format")
    if known.entry.head and known.entry.output not in modules:
        raise CheckpointError(
            f"llama.cpp's {known.name} needs an output layer, and this model has its embedding for one: use another format, or "
            'quantize with head="int8"'
        )
    kinds = {}
    for name in modules:
        if places[name].expert is None:  # an outline may take a read of the whole layer
            continue
        layer = source.outline(name) if name in source.layers else None
        weight = f"{name}.weight"
        kinds[weight] = source.dtype(weight) if layer is None else block_type(layer.bits, layer.symmetric)
    for there, names in _stacks(known, kinds).items():
        if odd := next((name for name in names if kinds[name] != kinds[names[0]]), None):
            raise CheckpointError(
                f"llama.cpp has all experts of {there} in one tensor, of one type: {names[0]} is {kinds[names[0]]}, {odd} is "
                f"{kinds[odd]}: give all experts the same settings"
            )
        if len(names) != known.experts:
            raise CheckpointError(
                f"{there} is made of {known.experts} experts, and there are {len(names)}: {names[0]}, ..."
            )


def _stacks(known: Architecture, names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Sort the tensors that are of experts by the one of the file that they are in, in its order."""
    found: dict[str, dict[int, str]] = {}
    for module, place in known.places().items():
        if place.expert is not None and f"{module}.weight" in names:
            found.setdefault(place.name, {})[place.expert] = f"{module}.weight"
    return {there: [experts[e] for e in sorted(experts)] for there, experts in found.items()}


def write_gguf(folder: Path, source: Any, layout: Gguf, summary: Summary, config: Mapping[str, Any]) -> None:
    """Write ``source`` to model.gguf in ``folder``, with the tokenizer that lies there; one tensor at a time is in memory."""
    package, known = gguf(), Architecture(config)  # for what of it has a place see foreseen
    writer = described(known)
    kinds = [block_type(facts.bits, facts.symmetric) for facts in summary.layers.values()]
    usual = max(sorted(set(kinds)), key=kinds.count)
    writer.add_file_type(package.LlamaFileType[f"MOSTLY_{usual}"])
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    tokenizers.describe(folder, writer, config)
    planned = list(_planned(source, known, summary))
    for one in planned:
        nbytes = int(np.prod(one.shape)) * (1 if one.kind in SIZES else FLOATS[one.kind].itemsize)
        element = np.dtype(np.uint8 if one.kind in SIZES else np.float32)
        writer.add_tensor_info(one.name, one.shape, element, nbytes, raw_dtype=package.GGMLQuantizationType[one.kind])
    writer.write_header_to_file(folder / GGUF)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    bias: Tensor | None = None
    for one in planned:
        if one.kind in SIZES:
            made = [_packed(source, known, layout, summary, name) for name in one.made_of]
            blocks, bias = [tensors["blocks"].flatten(1) for tensors in made], made[-1].get("bias")
            tensor = torch.stack(blocks) if one.stacked else blocks[0]
        elif not one.made_of:
            tensor = known.tensors()[one.name]
        elif one.made_of[0] in source.layers:  # the bias of the layer before
            tensor = bias
        else:
            floats = [_float(source, known, name) for name in one.made_of]
            tensor = torch.stack(floats) if one.stacked else floats[0]
        writer.write_tensor_data(_array(tensor.to(FLOATS[one.kind]) if one.kind in FLOATS else tensor))
    writer.close()


def _planned(source: Any, known: Architecture, summary: Summary) -> Iterator[_Planned]:
    """List the tensors to write."""
    places = known.places()
    stacks = _stacks(known, {*source.floats, *(f"{name}.weight" for name in source.layers)})
    first = {names[0]: names for names in stacks.values()}
    later = {name for names in stacks.values() for name in names[1:]}
    for name in source.floats:
        module, leaf = parted(name)
        names = tuple(first.get(name, [name]))
        shape, dtype = source.shape(name), source.dtype(name)
        # llama.cpp adds and multiplies vectors in float32 only
        kind = "F32" if len(shape) == 1 or name.endswith(CORRECTION) or dtype not in KINDS else KINDS[dtype]
        shape = shape[::-1] if known.transposed(name) else shape
        full = (len(names), *shape) if name in first else shape
        if name not in later:
            yield _Planned(f"{places[module].name}.{leaf}", full, kind, names, name in first)
    for name, tensor in known.tensors().items():
        yield _Planned(name, tuple(tensor.shape), "F32")
    for name, facts in summary.layers.items():
        weight = f"{name}.weight"
        if weight in later:
            continue
        names = tuple(each.removesuffix(".weight") for each in first.get(weight, [weight]))
        kind = block_type(facts.bits, facts.symmetric)
        shape = (facts.out_features, facts.in_features // BLOCK * SIZES[kind])
        full = (len(names), *shape) if weight in first else shape
        yield _Planned(f"{places[name].name}.weight", full, kind, names, weight in first)
        if source.outline(name).bias is not None:
            yield _Planned(f"{places[name].name}.bias", (facts.out_features,), "F32", (name,))


def _float(source: Any, known: Architecture, name: str) -> Tensor:
    return known.there(name, source.float_tensor(name).cpu())


def _packed(source: Any, known: Architecture, layout: Gguf, summary: Summary, name: str) -> dict[str, Tensor]:
    rows = known.rows(name, summary.layers[name].out_features)
    return layout.pack(_reordered(source.layer(name), rows))


def _reordered(layer: PackedLinear, rows: Tensor | None) -> PackedLinear:
    if rows is None:
        return layer
    bias = None if layer.bias is None else layer.bias[rows]
    return replace(layer, qweight=layer.qweight[rows], scales=layer.scales[rows], zeros=layer.zeros[rows], bias=bias)


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
