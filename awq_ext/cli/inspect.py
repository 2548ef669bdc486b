"""``awq-ext inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.quantized_dir import OTHER_CONFIGS, QuantDir
from ..checkpoints.saved import read_report, report_exists
from ..checkpoints.shards import INDEX, first_json
from ..checkpoints.version_1 import VERSION_1
from .hf import read_config
from .options import JsonPath, ModelDir, Overwrite, console_for, fact_table, one_line_errors, write_json


@one_line_errors
def inspect(model_dir: ModelDir, overwrite: Overwrite = False, json_path: JsonPath = None) -> None:
    """Say what is in a model's directory, without loading its weights.

    Format, quantized layers with their bits and group sizes, tensors by dtype, bytes on disk, and whether the files are whole
    (headers and lengths are read, not values).

    Example: awq-ext inspect ./Llama-int4
    """
    from .hf import folder

    facts = describe(folder(model_dir))
    console = console_for(json_path)
    console.print(fact_table((name, _shown(value)) for name, value in facts.items()))
    write_json(facts, json_path)


def describe(directory: Path) -> dict[str, Any]:
    """Collect what the files of a directory say. ValueError for one without safetensors files or with a damaged one."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} has no .safetensors file: there is nothing to inspect")
    if index := first_json(directory, INDEX):
        named = set((index.get("weight_map") or {}).values())
        if missing := sorted(named - {file.name for file in files}):
            raise ValueError(f"{directory} is not whole: its index names {', '.join(missing)}, which is missing")
    tensors, elements = Counter[str](), Counter[str]()
    for file in files:
        for dtype, count in read_header(file):
            tensors[dtype] += 1
            elements[dtype] += count
    config = read_config(directory)
    facts: dict[str, Any] = {
        "model": ", ".join(config.get("architectures") or []) or config.get("model_type", "unknown"),
        "format": "float",
        "bytes on disk": sum(file.stat().st_size for file in files),
        "tensors": {dtype: f"{tensors[dtype]} with {elements[dtype]:,} values" for dtype in sorted(tensors)},
    }
    facts |= _quantization(directory, config)
    if report_exists(directory):
        facts["report"] = read_report(directory).summary()
    return facts


def _quantization(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the quantization of a directory, which config.json or another file of a tool tells; {} for a float one."""
    if "quantization_config" not in config and not any((directory / n).exists() for n in (VERSION_1, *OTHER_CONFIGS)):
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
    widths = Counter(map(found.bits, found.layers))
    facts |= {"format": found.layout.name} | {f"int{bits} layers": widths[bits] for bits in sorted(widths)}
    if scaled := sum("pre_quant_scale" in leaves for leaves in found.layers.values()):
        facts["scaled at run time"] = scaled
    if of_layers:
        facts["group sizes"] = dict(Counter(str(size) for _, size, _ in of_layers))
    elif sizes:
        facts["group sizes"] = {str(sizes[0]): len(found.layers)} if len(sizes) == 1 else ", ".join(map(str, sizes))
    return facts


def read_header(file: Path) -> list[tuple[str, int]]:
    """Read (dtype, elements) of each tensor of a safetensors file; ValueError for one that is damaged or cut off."""
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
