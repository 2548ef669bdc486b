"""``awq-ext inspect``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

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
    tensors, elements = Counter[str](), Counter[str]()
    for file in files:
        for dtype, count in read_header(file):
            tensors[dtype] += 1
            elements[dtype] += count
    config = _json(directory / "config.json")
    facts: dict[str, Any] = {
        "model": ", ".join(config.get("architectures") or []) or config.get("model_type", "unknown"),
        "format": "float",
        "bytes on disk": sum(file.stat().st_size for file in files),
        "tensors": {dtype: f"{tensors[dtype]} with {elements[dtype]:,} values" for dtype in sorted(tensors)},
    }
    if quantization := config.get("quantization_config"):
        facts["format"] = quantization.get("quant_method", "unknown")
        facts["quantization_config"] = {k: v for k, v in quantization.items() if not isinstance(v, (dict, list))}
        if isinstance(
            layers := quantization.get("layers"), dict
        ):  # the native layout: name -> [in_features, group_size]
            facts["int4 layers"] = len(layers)
            facts["group sizes"] = dict(Counter(str(size) for _, size in layers.values()))
    if report := _json(directory / "awq_report.json"):
        from ..report import AwqReport

        facts["report"] = AwqReport.from_dict(report).summary()
    native = _json(directory / "awq_ext.json")
    if native:
        layers = native["layers"].values()
        facts["format"] = f"awq_ext {native['version']}"
        facts["int4 layers"] = len(layers)
        facts["group sizes"] = dict(Counter(str(layer["group_size"]) for layer in layers))
        facts["scaled at run time"] = sum(layer["pre_quant_scale"] for layer in layers)
        if native.get("report"):
            from ..report import AwqReport

            facts["report"] = AwqReport.from_dict(native["report"]).summary()
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


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {held}" for name, held in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
