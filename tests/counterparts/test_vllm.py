"""vLLM's CPU backend: directories written here are served, and generate what they generate here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from counterparts.counterpart import clear_prompt, needed, quantized_llama, run
from safetensors.torch import load_file

import awq_ext

LAYOUTS = pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])


@LAYOUTS
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_vllm_generates_the_same_tokens(layout: str, symmetric: bool, tmp_path: Path) -> None:
    needed("vllm")
    assert_same_tokens(quantized_llama(symmetric=symmetric), layout, tmp_path)


@LAYOUTS
def test_vllm_leaves_the_same_layers_float(layout: str, tmp_path: Path) -> None:
    needed("vllm")
    assert_same_tokens(quantized_llama(skip=("lm_head", "*.layers.0.*")), layout, tmp_path)


def assert_same_tokens(model: torch.nn.Module, layout: str, tmp_path: Path) -> None:
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format=layout)
    (prompt, generated), out = clear_prompt(tmp_path, model), tmp_path / "out.safetensors"
    run("vllm", "vllm_generate.py", folder, prompt, out)
    assert torch.equal(generated, load_file(out)["generated"])
