"""NVIDIA ModelOpt's unified Hugging Face checkpoint (W4A16_AWQ), against ModelOpt's own exporter and packer.

TensorRT-LLM, which serves these, needs a GPU and is not run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from counterparts.counterpart import needed, quantized_llama, run, tiny_phi, weights_of
from safetensors.torch import load_file, save_file
from ways import write_all

import awq_ext


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_export_of_modelopt_is_read_and_written_again(family: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "theirs", tmp_path / "out.safetensors"
    run("modelopt", "modelopt_write.py", folder, out, family)
    expected = load_file(out)
    tokens, logits = expected.pop("tokens"), expected.pop("logits")
    # its scales are fp32 values, which the int4 layers hold in fp16: 2^-11 of each weight
    model = awq_ext.from_pretrained(folder, dtype=torch.float16)
    weights = weights_of(model, torch.float32)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=2**-11, atol=0, msg=name)
    with torch.no_grad():
        ours = model.float()(tokens).logits
    assert (ours - logits).norm() < 0.01 * logits.norm()  # the same rounding, amplified by the layers

    again = awq_ext.save_pretrained(model, tmp_path / "ours", format="modelopt")
    assert_same_form(load_file(folder / "model.safetensors"), load_file(again / "model.safetensors"))
    theirs, ours_config = (json.loads((path / "hf_quant_config.json").read_text()) for path in (folder, again))
    assert ours_config["quantization"].keys() == theirs["quantization"].keys()
    for key, value in theirs["quantization"].items():
        if key != "exclude_modules":  # it lists embeddings too
            assert ours_config["quantization"][key] == value, key


def assert_same_form(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> None:
    """Every tensor of theirs is in ours, packed weights equal; beyond them ours has input scales of one."""
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        if tensor.dtype == torch.uint8:
            assert torch.equal(ours[name], tensor), name
        else:
            assert ours[name].is_floating_point() and tensor.is_floating_point(), name
    for name in ours.keys() - theirs.keys():
        assert name.endswith(".pre_quant_scale") and bool((ours[name] == 1).all()), name


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_its_packer_makes_the_bytes_written_here(kind: str, tmp_path: Path) -> None:
    needed("modelopt")
    model = quantized_llama(symmetric=True) if kind == "llama" else tiny_phi(symmetric=True, group_size=32)
    scaled = [name for name, layer in model.named_modules() if getattr(layer, "pre_quant_scale", None) is not None]
    assert bool(scaled) == (kind == "phi"), "one model with run-time scales, one without"
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="modelopt")
    save_file(weights_of(model, torch.float32), tmp_path / "weights.safetensors")
    run("modelopt", "modelopt_pack.py", folder, tmp_path / "weights.safetensors")
    tensors = load_file(folder / "model.safetensors")
    for name in scaled:
        assert torch.equal(tensors[f"{name}.pre_quant_scale"], model.get_submodule(name).pre_quant_scale)


def test_its_packer_makes_the_bytes_of_every_way_to_quantize(tmp_path: Path) -> None:
    """All that docs/formats.md says the layout holds."""
    needed("modelopt")
    models = write_all(tmp_path, "modelopt", torch.float16)
    for folder, model in models.items():
        save_file(weights_of(model, torch.float32), folder / "weights.safetensors")
    run(
        "modelopt",
        "modelopt_pack.py",
        *(each for folder in models for each in (folder, folder / "weights.safetensors")),
    )
