"""vLLM's CPU backend: directories written here are served, and generate what they generate here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from counterparts.counterpart import clear_prompt, needed, quantized_llama, run
from safetensors.torch import load_file

import awq_ext

CASES = [("awq", False), ("awq", True), ("compressed-tensors", False), ("compressed-tensors", True)]


@pytest.mark.parametrize(("layout", "symmetric"), CASES)
def test_vllm_generates_the_same_tokens(layout: str, symmetric: bool, tmp_path: Path) -> None:
    needed("vllm")
    model = quantized_llama(symmetric=symmetric)
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format=layout)
    (prompt, generated), out = clear_prompt(tmp_path, model), tmp_path / "out.safetensors"
    run("vllm", "vllm_generate.py", folder, prompt, out)
    assert torch.equal(generated, load_file(out)["generated"])
