"""AutoAWQ 0.2.9: what it wrote is read here, what was written here it reads, weights equal bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from counterparts.counterpart import (
    all_tensors,
    assert_same_weights,
    needed,
    prompt_file,
    quantized_llama,
    read_by,
    run,
    tiny_qwen2,
    weights_of,
)
from safetensors.torch import load_file
from ways import write_all

import awq_ext

WRITTEN = [
    ("llama", "gemm", 64),
    ("qwen2", "gemm", 32),
    ("llama", "gemv", 64),
    ("qwen2", "gemv", 32),
    ("llama", "gemv_fast", 64),
]


@pytest.mark.parametrize(("family", "version", "group_size"), WRITTEN, ids=str)
def test_a_model_that_autoawq_quantized_is_read_and_written_again(
    family: str, version: str, group_size: int, tmp_path: Path
) -> None:
    folder, weights = tmp_path / "model", tmp_path / "weights.safetensors"
    run("autoawq", "autoawq_write.py", folder, weights, family, version, group_size)
    model = awq_ext.from_pretrained(folder)
    assert_same_weights(weights_of(model, torch.float16), load_file(weights))
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    again = awq_ext.save_pretrained(model, tmp_path / "again", format="awq" if version == "gemm" else version)
    theirs, ours = all_tensors(folder), all_tensors(again)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("layout", ["awq", "gemv"])
def test_autoawq_reads_a_model_written_here(layout: str, tmp_path: Path) -> None:
    needed("autoawq")
    model = quantized_llama(torch.float16)
    prompt, logits = prompt_file(tmp_path), tmp_path / "logits.safetensors"
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format=layout, max_shard_size="300KB")
    forward = ["--logits", prompt, logits] if layout == "awq" else []
    run("autoawq", "autoawq_read.py", *forward, folder, tmp_path / "weights.safetensors")
    assert_same_weights(weights_of(model, torch.float16), load_file(tmp_path / "weights.safetensors"))
    if forward:
        with torch.no_grad():
            ours = model(load_file(prompt)["tokens"]).logits.float()
        theirs = load_file(logits)["logits"].float()
        # their weights are rounded to fp16 once more (2^-11 of each), and so is every product; the same model otherwise
        assert (ours - theirs).norm() < 0.01 * ours.norm()


@pytest.mark.parametrize("layout", ["awq", "gemv", "gemv_fast"])
def test_autoawq_reads_every_way_to_quantize(layout: str, tmp_path: Path) -> None:
    """All that docs/formats.md says the layout holds."""
    needed("autoawq")
    models = write_all(tmp_path, layout, torch.float16)
    for folder, theirs in read_by("autoawq", "autoawq_read.py", models).items():
        assert_same_weights(weights_of(models[folder], torch.float16), theirs)


@pytest.mark.parametrize("layout", ["awq", "gemv"])
def test_autoawq_reads_biases_written_here(layout: str, tmp_path: Path) -> None:
    needed("autoawq")
    model = tiny_qwen2(group_size=32)
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format=layout)
    run("autoawq", "autoawq_read.py", folder, tmp_path / "weights.safetensors")
    theirs = load_file(tmp_path / "weights.safetensors")
    biases = {name: theirs.pop(name) for name in list(theirs) if name.endswith(".bias")}
    assert_same_weights(weights_of(model, torch.float16), theirs)
    assert len(biases) == 6  # q, k and v of two blocks
    for name, bias in biases.items():
        assert torch.equal(model.get_parameter(name), bias), name
