"""A quantized output layer: those who read it generate, or unpack, what it stands for here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from counterparts.counterpart import assert_same_weights, clear_prompt, needed, quantized_llama, run, weights_of
from safetensors.torch import load_file

import awq_ext


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_vllm_generates_the_same_tokens(layout: str, tmp_path: Path) -> None:
    needed("vllm")
    model = quantized_llama(head="int4", symmetric=True)
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format=layout)
    (prompt, generated), out = clear_prompt(tmp_path, model), tmp_path / "out.safetensors"
    run("vllm", "vllm_generate.py", folder, prompt, out)
    assert torch.equal(generated, load_file(out)["generated"])


def test_compressed_tensors_unpacks_a_head_that_was_tied(tmp_path: Path) -> None:
    needed("compressed-tensors")
    model = quantized_llama(torch.float16, tied=True, head="int4")
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="compressed-tensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    run("compressed-tensors", "compressed_tensors_read.py", folder, tmp_path / "weights.safetensors")
    ours = weights_of(model, torch.float16)
    assert "lm_head" in ours
    assert_same_weights(ours, load_file(tmp_path / "weights.safetensors"))
