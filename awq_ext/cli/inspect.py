"""``awq-ext inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..reporting.readers import loaders, zero_points_told
from .console import console_for, fact_table, one_line_errors, write_json
from .options.types import JsonPath, ModelDir, Overwrite, Revision, Token


@one_line_errors
def inspect(
    model_dir: ModelDir,
    revision: Revision = None,
    token: Token = None,
    overwrite: Overwrite = False,
    json_path: JsonPath = None,
) -> None:
    """Say what is in a model's directory, and who can load it, without loading its weights.

    Format, quantized layers with their bits and group sizes, tensors by dtype, bytes on disk, and whether the files are whole
    (headers and lengths are read, not values).

    Example: awq-ext inspect ./Llama-int4
    """
    from .hf import folder

    facts = describe(folder(model_dir, revision, token), model_dir if model_dir.is_file() else None)
    console = console_for(json_path)
    shown = {name: value for name, value in facts.items() if name != "loaded_by"}
    if facts["format"] != "float":
        shown.setdefault("report", "none: nothing here tells how it was quantized")
    console.print(fact_table((name.replace("_", " "), _shown(value)) for name, value in shown.items()))
    console.print("loaded by" if facts["loaded_by"] else "loaded by no tool that awq_ext knows", soft_wrap=True)
    for reader in facts["loaded_by"]:
        needs = f"  ({reader['needs']})" if reader["needs"] else ""
        console.print(f"  {reader['program']}: {reader['command']}{needs}", soft_wrap=True, markup=False)
    write_json(facts, json_path)


def describe(directory: Path, alone: Path | None = None) -> dict[str, Any]:
    """Collect what the files of a directory say. ValueError for one without files of weights, or with a damaged one.

    alone: the GGUF file that the directory was made of, if it was.
    """
    from ..checkpoints.gguf.file import GGUF, kinds_in
    from ..checkpoints.saved import read_report, report_exists
    from ..checkpoints.shards import INDEX, first_json
    from .hf import read_config

    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob(GGUF))
    if not files:
        raise ValueError(f"{directory} has no .safetensors file: there is nothing to inspect")
    if index := first_json(directory, INDEX):
        named = set((index.get("weight_map") or {}).values())
        if missing := sorted(named - {file.name for file in files}):
            raise ValueError(f"{directory} is not whole: its index names {', '.join(missing)}, which is missing")
    tensors, elements = Counter[str](), Counter[str]()
    for file in files:
        for dtype, count in kinds_in(file) if file.name == GGUF else read_header(file):
            tensors[dtype] += 1
            elements[dtype] += count
    config = read_config(directory)
    facts: dict[str, Any] = {
        "model": ", ".join(config.get("architectures") or []) or config.get("model_type", "unknown"),
        "format": "float",
        "bytes_on_disk": sum(file.stat().st_size for file in files),
        "tensors": {dtype: {"tensors": tensors[dtype], "values": elements[dtype]} for dtype in sorted(tensors)},
    }
    facts |= _quantization(directory, config)
    if report_exists(directory):
        facts["report"] = read_report(directory).summary()
    # what config.json does not tell of, no other tool can load; with a note: what awq_ext cannot read
    known = bool(config) and "note" not in facts
    zero_points = zero_points_told(facts.get("quantization_config", {}))
    found = loaders(facts["format"], str(directory), zero_points) if known else []
    for one in found if alone is not None else ():
        one["command"] = one["command"].replace(str(directory / GGUF), str(alone)).replace(str(directory), str(alone))
    return facts | {"loaded_by": found}


def _quantization(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the quantization of a directory, which config.json or another file of a tool tells; {} for a float one."""
    from ..checkpoints.quantized_dir import OTHER_CONFIGS, QUANTIZATION, QuantDir
    from ..checkpoints.version_1 import VERSION_1

    said = next((config[key] for key in QUANTIZATION if config.get(key)), {})
    if not said and not any((directory / n).exists() for n in (VERSION_1, *OTHER_CONFIGS)):
        return {}
    facts: dict[str, Any] = {"format": said.get("quant_method", "unknown")} if said else {}
    # what has a dot in its name is of one layer
    if plain := {key: value for key, value in said.items() if isinstance(value, (str, int, float)) and "." not in key}:
        facts["quantization_config"] = plain
    try:
        found = QuantDir(directory)
    except ValueError as error:  # of a tool that is not read here
        return facts | {"note": str(error)}
    sizes, of_layers = found.settings.group_sizes, found.settings.per_layer.values()
    widths = Counter(map(found.bits, found.layers))
    facts |= {"format": found.layout.name, "quantized_layers": {f"int{bits}": widths[bits] for bits in sorted(widths)}}
    if scaled := sum("pre_quant_scale" in leaves for leaves in found.layers.values()):
        facts["scaled_at_run_time"] = scaled
    if of_layers:
        facts["group_sizes"] = dict(Counter(str(size) for _, size, _ in of_layers))
    elif sizes:  # of several sizes, the files do not say how many layers have which
        facts["group_sizes"] = {str(size): len(found.layers) if len(sizes) == 1 else None for size in sizes}
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
    """Write a fact for people: ``F32: 21 tensors, 1,234 values; U8: ...``."""
    if isinstance(value, dict) and all(isinstance(held, dict) for held in value.values()):
        each = {name: ", ".join(f"{count:,} {what}" for what, count in held.items()) for name, held in value.items()}
        return _shown(each)
    if isinstance(value, dict):
        return "; ".join(name if held is None else f"{name}: {held}" for name, held in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
