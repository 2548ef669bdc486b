"""Read the directories that awq_ext.save wrote before it wrote the native layout; the next release no longer does.

They hold awq_ext.json and one safetensors file that it names, with the tensors of the native layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .formats import CheckpointError
from .shards import read_json

VERSION_1 = "awq_ext.json"


@dataclass(frozen=True)
class Version1:
    """What awq_ext.json says: the quantization_config of the native layout, the file with the tensors, the report."""

    config: dict[str, Any]
    tensors: str
    report: dict[str, Any] | None


def read_version_1(folder: Path) -> Version1 | None:
    """Translate awq_ext.json; None where there is none, CheckpointError where it is damaged."""
    path = folder / VERSION_1
    if not path.exists():
        return None
    index = read_json(path)
    if index.get("format") != "awq_ext":
        raise CheckpointError(f"{path} does not describe an awq_ext checkpoint")
    if index.get("version") != 1:
        raise CheckpointError(f"{path} has version {index.get('version')!r}; this awq_ext reads version 1")
    name, layers, report = index.get("tensors"), index.get("layers"), index.get("report")
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise CheckpointError(f"{path} names {name!r} as its tensors: a .safetensors file beside it is needed")
    if not isinstance(layers, dict) or not isinstance(report, (dict, type(None))):
        raise CheckpointError(f"{path} is damaged: layers and report must be objects")
    for layer, entry in layers.items():
        if not isinstance(entry, dict):
            raise CheckpointError(f"{path}: the entry of layer {layer!r} is damaged: {entry!r}")
    config = {
        "quant_method": "awq_ext",
        "bits": 4,
        "version": 1,
        "layers": {layer: [entry.get("in_features"), entry.get("group_size")] for layer, entry in layers.items()},
        "experts": index.get("experts", {}),
        "in_memory": {
            "tied": index.get("tied"),
            "layers": {
                layer: [entry.get("dtype"), entry.get("compute_dtype", "auto")] for layer, entry in layers.items()
            },
        },
    }
    return Version1(config, name, report)
