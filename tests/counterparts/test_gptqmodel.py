"""Transformers with gptqmodel: an "awq" directory generates the same through its CPU kernel as through ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from counterparts.counterpart import assert_clear, needed, prompt_file, quantized_llama, run
from safetensors import safe_open
from safetensors.torch import load_file

import awq_ext


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_same_tokens_through_both_kernels(symmetric: bool, tmp_path: Path) -> None:
    needed("gptqmodel")
    folder = awq_ext.save_pretrained(quantized_llama(symmetric=symmetric), tmp_path / "model")
    prompt, out = prompt_file(tmp_path), tmp_path / "out.safetensors"
    run("gptqmodel", "gptqmodel_generate.py", folder, prompt, out)
    model = awq_ext.from_pretrained(folder)
    tokens = load_file(prompt)["tokens"]
    generated = model.generate(tokens, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert_clear(model, generated, margin=0.1)
    theirs = load_file(out)
    assert torch.equal(generated, theirs["generated"])
    with torch.no_grad():
        ours = model(tokens).logits
    # its kernel keeps scales and zeros in bfloat16 (2^-9 of each weight)
    assert (ours - theirs["logits"]).norm() < 0.02 * ours.norm()
    with safe_open(out, "pt") as file:
        assert "gptqmodel" in file.metadata()["kernel"], "Transformers did not run it through gptqmodel"
