"""Index: awq_ext.json, which tells what a checkpoint of :func:`awq_ext.save` holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import GROUP_SIZES, SCALE_DTYPES
from ..layers.quant_linear import COMPUTE_DTYPES, QuantLinear
from ..reporting.report import AwqReport
from ..standins.expert_linears import ExpertLinears
from .formats.packed import CheckpointError

INDEX_NAME = "awq_ext.json"
FORMAT_VERSION = 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def index_of(model: nn.Module, tensor_file: str, tied: dict[str, str]) -> dict[str, Any]:
    """What awq_ext.json says of ``model``. tied: name -> the name in ``tensor_file`` of the tensor that it shares."""
    report = getattr(model, "awq_report", None)
    modules = dict(model.named_modules())
    return {
        "format": "awq_ext",
        "version": FORMAT_VERSION,
        "tensors": tensor_file,
        "layers": {name: _describe(m) for name, m in modules.items() if isinstance(m, QuantLinear)},
        "experts": {name: m.use for name, m in modules.items() if isinstance(m, ExpertLinears)},
        "tied": tied,
        "report": report.to_dict() if isinstance(report, AwqReport) else None,
    }


def read_index(folder: Path) -> dict[str, Any]:
    """awq_ext.json, checked; CheckpointError if it is missing or damaged."""
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {INDEX_NAME}: it is no checkpoint of awq_ext.save") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(index, dict) or index.get("format") != "awq_ext":
        raise CheckpointError(f"{path} does not describe an awq_ext checkpoint")
    if index.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has version {index.get('version')!r}; this awq_ext reads version {FORMAT_VERSION}"
        )
    name = index.get("tensors")
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise CheckpointError(f"{path} names {name!r} as its tensors: a .safetensors file beside it is needed")
    tied = index.get("tied")
    if not isinstance(index.get("layers"), dict) or not isinstance(tied, dict):
        raise CheckpointError(f"{path} is damaged: layers or tied is missing")
    if not isinstance(index.get("experts", {}), dict):
        raise CheckpointError(f"{path} is damaged: experts must name parameters")
    if not all(isinstance(source, str) for source in tied.values()):
        raise CheckpointError(f"{path} is damaged: tied must name tensors")
    try:
        report = None if index.get("report") is None else AwqReport.from_dict(index["report"])
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: its report cannot be read: {error}") from None
    return index | {"report": report}


def empty_layer(model: nn.Module, name: str, entry: Any) -> QuantLinear:
    """A QuantLinear on the meta device for one entry of the index, checked against the module it will replace."""
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"the checkpoint has a layer {name!r}, the model has no such module") from None
    try:
        sizes = (entry["in_features"], entry["out_features"], entry["group_size"])
        flags = (entry["bias"], entry["pre_quant_scale"])
        dtypes = (_DTYPES[entry["dtype"]], SCALE_DTYPES[entry["scale_dtype"]])
        compute_dtype = entry.get("compute_dtype", "auto")
    except (KeyError, TypeError):
        raise CheckpointError(f"the entry of layer {name!r} is damaged: {entry!r}") from None
    known = (
        all(type(size) is int for size in sizes) and _is_group_size(sizes[2]) and all(type(f) is bool for f in flags)
    )
    if not known or min(sizes[:2]) < 1 or compute_dtype not in COMPUTE_DTYPES:
        raise CheckpointError(f"the entry of layer {name!r} is damaged: {entry!r}")
    if not isinstance(old, (nn.Linear, QuantLinear)) or (old.in_features, old.out_features) != sizes[:2]:
        raise CheckpointError(
            f"layer {name!r} is {sizes[0]} -> {sizes[1]} features in the checkpoint, in the model it is {old!r}"
        )
    layer = QuantLinear(*sizes, *flags, *dtypes, device="meta").train(old.training)
    layer.compute = compute_dtype
    return layer


def _is_group_size(size: int) -> bool:
    """One that quantize() makes, or that checkpoints of other tools have."""
    return size in GROUP_SIZES or (size > 0 and size % 8 == 0)


def _describe(layer: QuantLinear) -> dict[str, Any]:
    entry = {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "group_size": layer.group_size,
        "bias": layer.bias is not None,
        "pre_quant_scale": layer.pre_quant_scale is not None,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "scale_dtype": str(layer.tile_scales.dtype).removeprefix("torch."),
    }
    return entry if layer.compute == "auto" else entry | {"compute_dtype": layer.compute}
