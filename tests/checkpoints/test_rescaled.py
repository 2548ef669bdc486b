"""Models whose first forward multiplies weights in place: saved as they are then, and loaded so that it is not done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import HIDDEN, SETTINGS, Feed, loud
from checks import same_bits
from torch import Tensor, nn

import awq_ext
from awq_ext import CheckpointError

BATCHES = [torch.randn(4, 9, HIDDEN, generator=torch.Generator().manual_seed(1)) for _ in range(2)]


class Halving(nn.Module):
    """Divides the last weight of block i by 2^i, once, and what runs through the blocks likewise, as transformers' RWKV does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Feed() for _ in range(3)])
        self.done = False

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if not self.done:
                with torch.no_grad():
                    layer.down.weight.div_(2**i)
            x = layer(x) / 2
        self.done = True
        return x


def quantized() -> Halving:
    return awq_ext.quantize(loud(Halving()), BATCHES, **SETTINGS)


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(BATCHES[0])


def test_a_loaded_model_does_not_divide_twice(tmp_path: Path) -> None:
    model = quantized()
    awq_ext.save(model, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    assert config["rescaled"] == {"layers.1.down": 0.5, "layers.2.down": 0.25}
    loaded = awq_ext.load(Halving(), tmp_path / "x")
    for _ in range(2):
        assert same_bits(output(loaded), output(model))
    awq_ext.save(loaded, tmp_path / "y")
    again = awq_ext.load(Halving(), tmp_path / "y")
    assert same_bits(output(again), output(model))
    with pytest.raises(RuntimeError, match="dequantized copy"):
        loaded.layers[1].down.weight.mul_(2)  # the way back is no division that was done


def test_other_formats_have_no_place_for_it(tmp_path: Path) -> None:
    model = awq_ext.quantize(loud(Halving()), BATCHES, method="rtn", **SETTINGS)
    with pytest.raises(CheckpointError, match=r"layers\.1\.down, layers\.2\.down: the model's own first forward"):
        awq_ext.save_pretrained(model, tmp_path / "x")
    awq_ext.save_pretrained(model, tmp_path / "x", format="native")
    assert same_bits(output(awq_ext.load(Halving(), tmp_path / "x")), output(model))


def test_what_cannot_be_told_is_refused_by_the_first_forward(tmp_path: Path) -> None:
    """The model had run before, so nobody knows what its weights were."""
    model = loud(Halving())
    output(model)
    awq_ext.save(awq_ext.quantize(model, BATCHES, **SETTINGS), tmp_path / "x")
    loaded = awq_ext.load(Halving(), tmp_path / "x")
    with pytest.raises(RuntimeError, match="dequantized copy"):
        output(loaded)


@pytest.mark.parametrize("said", [[], {"layers.1.down": 3.0}, {"layers.1.down": "0.5"}, {"layers.9.down": 0.5}])
def test_a_damaged_entry_is_refused(said: Any, tmp_path: Path) -> None:
    awq_ext.save(quantized(), tmp_path / "x")
    file = tmp_path / "x" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["rescaled"] = said
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="rescaled must be name of a layer -> power of two"):
        awq_ext.load(Halving(), tmp_path / "x")
