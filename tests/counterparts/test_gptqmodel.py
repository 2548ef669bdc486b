"""Transformers with gptqmodel: an "awq" directory generates the same through its CPU kernel as through ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from counterparts.counterpart import (
    assert_same_weights,
    byte_tokenizer,
    clear_prompt,
    needed,
    quantized_llama,
    quantized_qwen2,
    run,
    weights_of,
)
from safetensors import safe_open
from safetensors.torch import load_file

import awq_ext


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "Qwen2"])
def test_same_tokens_through_both_kernels(kind: str, tmp_path: Path) -> None:
    needed("gptqmodel")
    made = quantized_qwen2() if kind == "Qwen2" else quantized_llama(symmetric=kind == "symmetric")
    folder = awq_ext.save_pretrained(made, tmp_path / "model")
    model = awq_ext.from_pretrained(folder)
    (prompt, generated), out = clear_prompt(tmp_path, model), tmp_path / "out.safetensors"
    run("gptqmodel", "gptqmodel_generate.py", folder, prompt, out)
    theirs = load_file(out)
    assert torch.equal(generated, theirs["generated"])
    with torch.no_grad():
        ours = model(load_file(prompt)["tokens"]).logits
    # its kernel keeps scales and zeros in bfloat16 (2^-9 of each weight)
    assert (ours - theirs["logits"]).norm() < 0.02 * ours.norm()
    with safe_open(out, "pt") as file:
        assert "gptqmodel" in file.metadata()["kernel"], "Transformers did not run it through gptqmodel"


MIXED = {"per_layer": {"*.down_proj": {"bits": 8}}}


@pytest.mark.parametrize("settings", [MIXED, {"bits": 8}], ids=["mixed", "eight"])
def test_gptqmodel_reads_layers_of_eight_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    """A "gptq" directory, ``dynamic`` included, in layers that GPTQModel builds for it; with zero points it refuses them."""
    needed("gptqmodel")
    model = quantized_llama(symmetric=True, **settings)
    out, tokenizer = tmp_path / "out.safetensors", byte_tokenizer()  # without which GPTQModel loads nothing
    tokenizer.pad_token = "!"
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="gptq", tokenizer=tokenizer)
    run("gptqmodel", "gptqmodel_read.py", folder, out)
    theirs = load_file(out)
    ours, again = weights_of(model, torch.float32), weights_of(awq_ext.from_pretrained(folder), torch.float32)
    assert_same_weights(ours, again)
    assert ours.keys() == theirs.keys()
    with safe_open(out, "pt") as file:
        widths = file.metadata()
    for name, weight in ours.items():
        assert int(widths[name]) == model.get_submodule(name).bits
        # it dequantizes in float16
        assert (weight - theirs[name]).abs().max() <= 2**-10 * weight.abs().max(), name
