"""Transformers with gptqmodel: an "awq" directory generates the same through its CPU kernel as through ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from counterparts.counterpart import clear_prompt, needed, quantized_llama, run
from safetensors import safe_open
from safetensors.torch import load_file

import awq_ext


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_same_tokens_through_both_kernels(symmetric: bool, tmp_path: Path) -> None:
    needed("gptqmodel")
    folder = awq_ext.save_pretrained(quantized_llama(symmetric=symmetric), tmp_path / "model")
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
