"""Directories with a quantized checkpoint, as awq_ext or another tool writes them, and the layers to put in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checks import same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

from awq_ext.checkpoints.formats import LAYOUTS, Facts, InMemory, PackedLinear, Summary
from awq_ext.checkpoints.quantized_dir import QuantDir
from awq_ext.kernels import reference


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


class MemorySource:
    """Layers and float tensors as a QuantDir gives them, without files."""

    folder = "memory"

    def __init__(
        self,
        layers: dict[str, PackedLinear],
        floats: dict[str, Tensor],
        in_memory: InMemory | None = None,
        experts: dict[str, str] | None = None,
    ) -> None:
        self.layers, self.tensors, self.floats = layers, floats, list(floats)
        self.in_memory, self.experts, self.heads = in_memory, experts or {}, ()

    def layer(self, name: str) -> PackedLinear:
        return self.layers[name]

    outline = layer

    def float_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        tied = {} if self.in_memory is None else self.in_memory.tied
        return tuple(self.tensors[tied.get(name, name)].shape)

    def dtype(self, name: str) -> torch.dtype:
        tied = {} if self.in_memory is None else self.in_memory.tied
        return self.tensors[tied.get(name, name)].dtype


def random_layer(
    n: int = 16,
    k: int = 128,
    g: int = 32,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float16,
    bias: bool = False,
    scaled: bool = False,
    bits: int = 4,
) -> PackedLinear:
    """Codes of the whole range, zeros from 1 up (0 is no zero that GPTQ can hold); scales of both signs where symmetric."""
    groups = reference.group_count(k, g)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    zeros = torch.randint(1, 2**bits, (n, groups), dtype=torch.uint8)
    scales = torch.rand(n, groups) * 0.02 + 0.001
    signs = torch.randint(0, 2, (n, groups)) * 2 - 1 if symmetric else 1
    return PackedLinear(
        qweight=reference.pack_int4(codes) if bits == 4 else codes,
        scales=(scales * signs).to(dtype),
        zeros=torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros,
        in_features=k,
        group_size=g,
        bias=torch.randn(n).to(dtype) if bias else None,
        pre_quant_scale=torch.rand(k) + 0.5 if scaled else None,
        bits=bits,
    )


NAMES = ("layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "layers.1.self_attn.q_proj")


def make_directory(folder: Path, format: str = "native", **options: Any) -> dict[str, PackedLinear]:
    """A checkpoint of a few layers and floats of several dtypes, as some other tool would have written it."""
    settings = {"n": 64, "k": 128, "g": 32, "symmetric": True} | options
    layers = {name: random_layer(**settings, bias="q_proj" in name) for name in NAMES}
    summary = Summary({name: Facts.of(layer) for name, layer in layers.items()}, ["lm_head"])
    tensors: dict[str, Tensor] = {
        "embed.weight": torch.randn(10, 128, dtype=torch.bfloat16),
        "norm.weight": torch.randn(128),
        "lm_head.weight": torch.randn(10, 128, dtype=torch.float16),
        "position_ids": torch.arange(7),
    }
    for name, layer in layers.items():
        tensors |= {
            f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in LAYOUTS[format].pack(layer, summary).items()
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "none",
        "hidden_size": 128,
        "quantization_config": LAYOUTS[format].quantization_config(summary),
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("tokens")
    return layers


def assert_holds(folder: Path, layers: dict[str, PackedLinear]) -> None:
    found = QuantDir(folder)
    assert set(found.layers) == set(layers)
    for name, layer in layers.items():
        other = found.layer(name)
        for attribute in ("qweight", "zeros", "bias"):
            a, b = getattr(layer, attribute), getattr(other, attribute)
            assert (a is None and b is None) or same_bits(a, b), (name, attribute)
        assert torch.equal(layer.scales.double(), other.scales.double())
        assert (layer.in_features, layer.groups) == (other.in_features, other.groups)


def without(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(tuple(f"{each}." for each in names))]:
            del tensors[name]

    return change
