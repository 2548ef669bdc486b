"""``awq-ext inspect``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..checkpoints.saved import read_index
from .hf import REPORT_NAME, read_object, read_report
from .options import JsonPath, ModelDir, console_for, fact_table, one_line_errors, write_json


@one_line_errors
def inspect(model_dir: ModelDir, json_path: JsonPath = None) -> None:
    """Say what is in a model's directory, without loading its weights.

    Format, quantized layers with their bits and group sizes, tensors by dtype, bytes on disk, and whether the files are whole
    (headers and lengths are read, not values).

    Example: awq-ext inspect ./Llama-int4
    """
    facts = describe(model_dir)
    console = console_for(json_path)
    console.print(fact_table((name, _shown(value)) for name, value in facts.items()))
    write_json(facts, json_path)


def describe(directory: Path) -> dict[str, Any]:
    """What the files of a directory say. ValueError for one without safetensors files or with a damaged one."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} has no .safetensors file: there is nothing to inspect")
    if index := read_object(directory / "model.safetensors.index.json"):
        named = set((index.get("weight_map") or {}).values())
        if missing := sorted(named - {file.name for file in files}):
            raise ValueError(f"{directory} is not whole: its index names {', '.join(missing)}, which is missing")
    tensors, elements = Counter[str](), Counter[str]()
    for file in files:
        for dtype, count in read_header(file):
            tensors[dtype] += 1
            elements[dtype] += count
    config = read_object(directory / "config.json")
    facts: dict[str, Any] = {
        "model": ", ".join(config.get("architectures") or []) or config.get("model_type", "unknown"),
        "format": "float",
        "bytes on disk": sum(file.stat().st_size for file in files),
        "tensors": {dtype: f"{tensors[dtype]} with {elements[dtype]:,} values" for dtype in sorted(tensors)},
    }
    facts |= _own(directory) if (directory / "awq_ext.json").exists() else _quantization(directory, config)
    if (directory / REPORT_NAME).exists():
        facts["report"] = read_report(directory).summary()
    return facts


def _own(directory: Path) -> dict[str, Any]:
    """Of a directory that ``awq_ext.save`` wrote."""
    index = read_index(directory)
    layers = index["layers"].values()
    facts: dict[str, Any] = {
        "format": f"awq_ext {index['version']}",
        "int4 layers": len(layers),
        "group sizes": dict(Counter(str(layer["group_size"]) for layer in layers)),
        "scaled at run time": sum(layer["pre_quant_scale"] for layer in layers),
    }
    return facts | ({"report": index["report"].summary()} if index["report"] else {})


def _quantization(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Of a directory whose config.json (or another file of a tool) tells how it is quantized; {} for a float one."""
    from ..checkpoints.quantized_dir import OTHER_CONFIGS, QuantDir

    if "quantization_config" not in config and not any((directory / name).exists() for name in OTHER_CONFIGS):
        return {}
    said = config.get("quantization_config") or {}
    facts: dict[str, Any] = {"format": said.get("quant_method", "unknown")} if said else {}
    if plain := {name: value for name, value in said.items() if isinstance(value, (str, int, float))}:
        facts["quantization_config"] = plain
    try:
        found = QuantDir(directory)
    except ValueError as error:  # of a tool that is not read here
        return facts | {"note": str(error)}
    sizes, of_layers = found.settings.group_sizes, found.settings.per_layer.values()
    facts |= {"format": found.layout.name, "int4 layers": len(found.layers)}
    if of_layers:
        facts["group sizes"] = dict(Counter(str(size) for _, size in of_layers))
    elif sizes:
        facts["group sizes"] = {str(sizes[0]): len(found.layers)} if len(sizes) == 1 else ", ".join(map(str, sizes))
    return facts


def read_header(file: Path) -> list[tuple[str, int]]:
    """(dtype, elements) of each tensor of a safetensors file; ValueError for one that is damaged or cut off."""
    from math import prod

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            slices = [handle.get_slice(name) for name in handle.keys()]  # noqa: SIM118  (not a dict)
            return [(part.get_dtype(), prod(part.get_shape())) for part in slices]
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {held}" for name, held in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
