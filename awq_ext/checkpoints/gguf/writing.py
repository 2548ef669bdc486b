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
from .architecture import CORRECTION, Architecture, Place, gguf, module_of, parted, whole
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
    there = dict.fromkeys((*source.layers, *(parted(name)[0] for name in source.floats)))
    modules = [part for name in there for part in known.parts(name)]
    for name in modules:
        if name not in places:
            raise CheckpointError(f"llama.cpp's {known.name} has no tensor for {module_of(name)}: use another format")
    if known.entry.head and known.entry.output not in modules:
        raise CheckpointError(
            f"llama.cpp's {known.name} needs an output layer, and this model has its embedding for one: use another format, or "
            'quantize with head="int8"'
        )
    kinds = {}
    for name in modules:
        if places[name].expert is None:  # an outline may take a read of the whole layer
            continue
        weight, inside = f"{name}.weight", module_of(name)
        layer = source.outline(inside) if inside in source.layers else None
        kinds[weight] = source.dtype(f"{inside}.weight") if layer is None else block_type(layer.bits, layer.symmetric)
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
    parts = {f"{part}.weight": name for name in source.layers for part in known.parts(name)}
    floats = [
        whole(part, leaf) for name in source.floats for module, leaf in [parted(name)] for part in known.parts(module)
    ]
    stacks = _stacks(known, {*floats, *parts})
    first = {names[0]: names for names in stacks.values()}
    later = {name for names in stacks.values() for name in names[1:]}
    for name in floats:
        if name not in later:
            yield _float_planned(source, known, places, name, first.get(name))
    for name, tensor in known.tensors().items():
        yield _Planned(name, tuple(tensor.shape), "F32")
    for weight, name in parts.items():
        if weight in later:
            continue
        facts, there = summary.layers[name], places[weight.removesuffix(".weight")].name
        names = tuple(each.removesuffix(".weight") for each in first.get(weight, [weight]))
        kind = block_type(facts.bits, facts.symmetric)
        rows = facts.out_features // len(known.parts(name))
        shape = (rows, facts.in_features // BLOCK * SIZES[kind])
        full = (len(names), *shape) if weight in first else shape
        yield _Planned(f"{there}.weight", full, kind, names, weight in first)
        if source.outline(name).bias is not None:
            yield _Planned(f"{there}.bias", (rows,), "F32", (name,))


def _float_planned(
    source: Any, known: Architecture, places: Mapping[str, Place], name: str, stack: list[str] | None
) -> _Planned:
    """Plan a float tensor, or ``stack``, the experts of which it is the first."""
    (module, leaf), inside = parted(name), module_of(name)
    shape, dtype = source.shape(inside), source.dtype(inside)
    # llama.cpp adds and multiplies vectors in float32 only
    vector = len(shape) == 1 or name.endswith(CORRECTION) or known.squeezed(name)
    kind = "F32" if vector or dtype not in KINDS else KINDS[dtype]
    shape = (shape[0], shape[2]) if known.squeezed(name) else shape
    shape = shape[::-1] if known.transposed(name) else shape
    if inside != name:
        shape = (*shape[:-2], shape[-2] // 2, shape[-1])
    full = shape if stack is None else (len(stack), *shape)
    return _Planned(f"{places[module].name}.{leaf}", full, kind, tuple(stack or [name]), stack is not None)


def _float(source: Any, known: Architecture, name: str) -> Tensor:
    return known.there(name, source.float_tensor(module_of(name)).cpu())


def _packed(source: Any, known: Architecture, layout: Gguf, summary: Summary, name: str) -> dict[str, Tensor]:
    layer = module_of(name)
    return layout.pack(_reordered(source.layer(layer), known.rows(name, summary.layers[layer].out_features)))


def _reordered(layer: PackedLinear, rows: Tensor | None) -> PackedLinear:
    if rows is None:
        return layer
    bias = None if layer.bias is None else layer.bias[rows]
    return replace(layer, qweight=layer.qweight[rows], scales=layer.scales[rows], zeros=layer.zeros[rows], bias=bias)


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
