"""Float model -> quantize -> every format -> its reader, and plain torch: the same codes, scales, zeros and weights.

docs/formats.md has the table of what there is. All else is refused before anything is quantized or written.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import decode
from safetensors.torch import load_file
from tiny_transformers import float_model
from torch import Tensor, nn
from ways import BATCH, SIZES, WAYS, Way, documented, layers_of

import awq_ext
from awq_ext.checkpoints.formats import LAYOUTS

TABLE = documented()
# of Llamas: what llama.cpp calls a layer, and how many heads have their rows in another order
GGUF = {"q_proj": ("attn_q", 4), "k_proj": ("attn_k", 2), "v_proj": ("attn_v", 0), "o_proj": ("attn_output", 0)}
GGUF |= {f"{name}_proj": (f"ffn_{name}", 0) for name in ("gate", "up", "down")}


def codes_of(layer: awq_ext.QuantLinear) -> Tensor:
    rows = layer.qweight.long()
    return rows if layer.bits == 8 else torch.stack((rows & 15, rows >> 4), 2).flatten(1)


def spread(tensor: Tensor, groups: int) -> Tensor:
    """The scales or zeros of the smaller groups that formats store a group as; columns are told by their number."""
    return tensor.repeat_interleave(groups // tensor.shape[1], 1)


def test_the_table_has_all_formats_and_nothing_else() -> None:
    assert list(TABLE) == list(LAYOUTS)
    assert set().union(*TABLE.values()) == set(WAYS)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_path(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a third of the time
    model = float_model(**SIZES)
    weights = {name: linear.weight.detach().clone() for name, linear in model.named_modules() if is_float(name, linear)}
    for name in LAYOUTS:
        if way in TABLE[name]:
            awq_ext.check_format(model, BATCH, name, **way.settings)
        else:
            with pytest.raises(awq_ext.CheckpointError, match=reason(name, way)):
                awq_ext.check_format(model, BATCH, name, **way.settings)
    awq_ext.quantize(model, [BATCH], **way.settings, progress=False)
    assert layers_of(model).keys() == weights.keys()
    for name, layer in layers_of(model).items():
        assert (layer.bits, layer.group_size) == (way.bits, way.group_size)
        assert bool((layer.zeros == 1 << way.bits - 1).all()) == way.symmetric
        # half a step (of symmetric weights one step at the end that has one code less), and what rounding the scale moves it
        error = (layer.weight - weights[name]).abs() / spread(layer.scales.abs(), layer.in_features)
        assert error.max() <= (1 if way.symmetric else 0.5) + 2 ** (way.bits - 11), name
    for name in LAYOUTS:
        folder = tmp_path / name
        if way in TABLE[name]:
            awq_ext.save_pretrained(model, folder, format=name)
            assert_read_the_same(model, folder)
            assert_decoded_the_same(model, folder, name)
            continue
        with pytest.raises(awq_ext.CheckpointError, match=reason(name, way)):
            awq_ext.save_pretrained(model, folder, format=name)
        assert not folder.exists()


def is_float(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


def reason(name: str, way: Way) -> str:
    """What an error says."""
    if way.bits == 8 and 8 not in LAYOUTS[name].widths:
        return "q_proj.* it has 8 bits, not 4"
    if name == "compressed-tensors-w8a8":
        return f"it has 8 bits with {'zero points' if way.group_size == -1 else f'groups of {way.group_size}'}"
    if name == "modelopt" and way.symmetric:
        return "every row is one group .* quantize with group_size=128"
    return "it has zero points|it has 8 bits and zero points"


def assert_read_the_same(model: nn.Module, folder: Path) -> None:
    again = layers_of(awq_ext.from_pretrained(folder))
    assert again.keys() == layers_of(model).keys()
    for name, layer in layers_of(model).items():
        other = again[name]
        groups = other.scales.shape[1]
        assert other.bits == layer.bits and torch.equal(other.qweight, layer.qweight), (folder.name, name)
        assert torch.equal(other.scales.double(), spread(layer.scales, groups).double()), (folder.name, name)
        assert torch.equal(other.zeros, spread(layer.zeros, groups)), (folder.name, name)
        assert torch.equal(other.weight, layer.weight), (folder.name, name)


def assert_decoded_the_same(model: nn.Module, folder: Path, format: str) -> None:
    stored = gguf_tensors(folder) if format == "gguf" else load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for name, layer in layers_of(model).items():
        tensors = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
        size = declared(format, config, name, layer.in_features)
        shape = (layer.out_features, layer.in_features, layer.in_features // size)
        found = decode(format, tensors, shape, layer.bits)
        assert torch.equal(found.codes, codes_of(layer)), (format, name)
        assert torch.equal(found.scales, spread(layer.scales, shape[2]).double()), (format, name)
        assert torch.equal(found.zeros, spread(layer.zeros, shape[2]).long()), (format, name)
        assert torch.equal(found.weight().float(), layer.weight.float()), (format, name)


def declared(format: str, config: dict[str, Any], name: str, in_features: int) -> int:
    """The group size that config.json tells other readers."""
    if format == "gguf":
        return 32
    if format.startswith("compressed-tensors"):
        (group,) = config["config_groups"].values()
        config = {"group_size": group["weights"]["group_size"] or -1}
    if format == "native":
        config = {"group_size": config["layers"][name][1]}
    if format == "mlx":
        config = config | config.get(name, {})
    return config["group_size"] if config["group_size"] != -1 else in_features


def gguf_tensors(folder: Path) -> dict[str, Tensor]:
    """The blocks of each layer by its name in transformers, rows in its order."""
    gguf = pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")
    found = {}
    for tensor in gguf.GGUFReader(folder / "model.gguf").tensors:
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        for leaf, (theirs, heads) in GGUF.items():
            if match and match[2] == theirs:
                blocks = torch.from_numpy(tensor.data.copy())
                size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[tensor.tensor_type.name]
                if heads:  # the two halves of a head take turns there
                    blocks = blocks.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
                part = "self_attn" if theirs.startswith("attn") else "mlp"
                found[f"model.layers.{match[1]}.{part}.{leaf}.blocks"] = blocks.unflatten(1, (-1, size))
    return found
