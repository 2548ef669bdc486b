"""compressed-tensors and llm-compressor: both ways, symmetric and asymmetric, weights equal bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from counterparts.counterpart import (
    all_tensors,
    assert_same_weights,
    needed,
    quantized_llama,
    read_by,
    run,
    tiny_qwen2,
    weights_of,
)
from safetensors.torch import load_file
from ways import write_all

import awq_ext

SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


@SYMMETRIC
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_that_llmcompressor_quantized_is_read(family: str, symmetric: bool, tmp_path: Path) -> None:
    folder, weights = tmp_path / "model", tmp_path / "weights.safetensors"
    kind = "symmetric" if symmetric else "asymmetric"
    run("compressed-tensors", "llmcompressor_write.py", folder, weights, family, kind)
    model, theirs = awq_ext.from_pretrained(folder), load_file(weights)
    assert_same_logits(model, theirs)
    assert_same_weights(weights_of(model, torch.float16), theirs)


def assert_same_logits(model: torch.nn.Module, theirs: dict[str, torch.Tensor]) -> None:
    """And take them out, with their tokens: theirs are of the weights rounded to float16 once more (2^-11 of each)."""
    tokens, logits = theirs.pop("tokens"), theirs.pop("logits")
    with torch.no_grad():
        assert (model.float()(tokens).logits - logits).norm() < 0.002 * logits.norm()


@pytest.mark.parametrize(("kind", "size"), [("W8A16", 128), ("rows of 8 bits", -1), ("zeros of 8 bits", 32)])
def test_layers_of_eight_bits_that_llmcompressor_made_are_read(kind: str, size: int, tmp_path: Path) -> None:
    """And written again here, every tensor the same."""
    folder, weights = tmp_path / "model", tmp_path / "weights.safetensors"
    run("compressed-tensors", "llmcompressor_write.py", folder, weights, "llama", kind)
    model, theirs = awq_ext.from_pretrained(folder), load_file(weights)
    layers = [layer for layer in model.modules() if isinstance(layer, awq_ext.QuantLinear)]
    assert {(layer.bits, layer.group_size, layer.compute) for layer in layers} == {(8, size, "auto")}
    again = awq_ext.save_pretrained(model, tmp_path / "again", format="compressed-tensors", verify=True)
    one, other = all_tensors(folder), all_tensors(again)
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert_same_logits(model, theirs)
    assert_same_weights(weights_of(model, torch.float16), theirs)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_of_its_scheme_w8a8_is_read(family: str, tmp_path: Path) -> None:
    """Its rounded activations are those of our int8 kernels, but for a scale for each 256 channels instead of each row."""
    folder, weights = tmp_path / "model", tmp_path / "weights.safetensors"
    run("compressed-tensors", "llmcompressor_write.py", folder, weights, family, "W8A8")
    model = awq_ext.from_pretrained(folder)
    assert_same_weights(weights_of(model, torch.float16), load_file(weights))
    layers = [layer for layer in model.modules() if isinstance(layer, awq_ext.QuantLinear)]
    assert {(layer.bits, layer.group_size, layer.compute) for layer in layers} == {(8, -1, "int8")}
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    again = awq_ext.save_pretrained(model, tmp_path / "again", format="compressed-tensors-w8a8", verify=True)
    one, other = all_tensors(folder), all_tensors(again)
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


ROWS = {"bits": 8, "group_size": -1, "symmetric": True}


@SYMMETRIC
@pytest.mark.parametrize("settings", [{"per_layer": {"*.down_proj": ROWS}}, ROWS], ids=["mixed", "eight"])
def test_its_compressor_unpacks_w8a8(settings: dict[str, Any], symmetric: bool, tmp_path: Path) -> None:
    """Layers of 4 bits beside may have zero points."""
    needed("compressed-tensors")
    model = quantized_llama(torch.float16, **{"symmetric": symmetric} | settings)
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="compressed-tensors-w8a8", verify=True)
    run("compressed-tensors", "compressed_tensors_read.py", folder, tmp_path / "weights.safetensors")
    ours = weights_of(model, torch.float16)
    assert_same_weights(ours, load_file(tmp_path / "weights.safetensors"))
    assert_same_weights(ours, weights_of(awq_ext.from_pretrained(folder), torch.float16))


@pytest.mark.parametrize("layout", ["compressed-tensors", "compressed-tensors-w8a8"])
def test_its_compressor_unpacks_every_way_to_quantize(layout: str, tmp_path: Path) -> None:
    """All that docs/formats.md says the layout holds."""
    needed("compressed-tensors")
    models = write_all(tmp_path, layout, torch.float16)
    for folder, theirs in read_by("compressed-tensors", "compressed_tensors_read.py", models).items():
        assert_same_weights(weights_of(models[folder], torch.float16), theirs)


@SYMMETRIC
@pytest.mark.parametrize("group_size", [64, -1])
def test_its_compressor_unpacks_a_model_written_here(symmetric: bool, group_size: int, tmp_path: Path) -> None:
    needed("compressed-tensors")
    model = quantized_llama(torch.float16, symmetric=symmetric, group_size=group_size)
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="compressed-tensors", max_shard_size="300KB")
    run("compressed-tensors", "compressed_tensors_read.py", folder, tmp_path / "weights.safetensors")
    assert_same_weights(weights_of(model, torch.float16), load_file(tmp_path / "weights.safetensors"))


def test_its_compressor_unpacks_bfloat16_scales(tmp_path: Path) -> None:
    needed("compressed-tensors")
    model = tiny_qwen2(dtype=torch.bfloat16, group_size=32, scale_dtype="bfloat16")
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="compressed-tensors")
    run("compressed-tensors", "compressed_tensors_read.py", folder, tmp_path / "weights.safetensors")
    assert_same_weights(weights_of(model, torch.bfloat16), load_file(tmp_path / "weights.safetensors"))


@SYMMETRIC
@pytest.mark.parametrize("settings", [{"per_layer": {"*.down_proj": {"bits": 8}}}, {"bits": 8}], ids=["mixed", "eight"])
def test_its_compressor_unpacks_layers_of_eight_bits(settings: dict[str, Any], symmetric: bool, tmp_path: Path) -> None:
    needed("compressed-tensors")
    model = quantized_llama(torch.float16, symmetric=symmetric, **settings)
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="compressed-tensors")
    run("compressed-tensors", "compressed_tensors_read.py", folder, tmp_path / "weights.safetensors")
    ours = weights_of(model, torch.float16)
    assert_same_weights(ours, load_file(tmp_path / "weights.safetensors"))
    assert_same_weights(ours, weights_of(awq_ext.from_pretrained(folder), torch.float16))
