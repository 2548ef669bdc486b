"""Directories with a quantized checkpoint, as awq_ext or another tool writes them, and the layers to put in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place; what ``change`` returns, if anything, takes the place of all of it."""
    content = json.loads(path.read_text())
    result = change(content)
    path.write_text(json.dumps(content if result is None else result))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a directory with one safetensors file in place."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def as_version_1(folder: Path) -> Path:
    """Turn a directory of awq_ext.save into what that wrote before it wrote the native layout; returns it."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (file,) = folder.glob("*.safetensors")
    tensors, report = load_file(file), folder / "awq_report.json"
    run_time = config["in_memory"]["layers"]

    def entry(name: str, sizes: list[int]) -> dict[str, Any]:
        # tensors are tied under names of the model, of which a layer may have its bias only
        scales = tensors[config["in_memory"]["tied"].get(f"{name}.scales", f"{name}.scales")]
        found = {
            "in_features": sizes[0],
            "out_features": len(scales),
            "group_size": sizes[1],
            "bias": f"{name}.bias" in {*tensors, *config["in_memory"]["tied"]},
            "pre_quant_scale": f"{name}.pre_quant_scale" in tensors,
            "dtype": run_time[name][0],
            "scale_dtype": str(scales.dtype).removeprefix("torch."),
        }
        return found if run_time[name][1] == "auto" else found | {"compute_dtype": run_time[name][1]}

    index = {
        "format": "awq_ext",
        "version": 1,
        "tensors": "model-0123456789ab.safetensors",
        "layers": {name: entry(name, sizes) for name, sizes in config["layers"].items()},
        "experts": config["experts"],
        "tied": config["in_memory"]["tied"],
        "report": json.loads(report.read_text()) if report.exists() else None,
    }
    file.rename(folder / index["tensors"])
    report.unlink(missing_ok=True)
    (folder / "config.json").unlink()
    (folder / "awq_ext.json").write_text(json.dumps(index, indent=1))
    return folder
