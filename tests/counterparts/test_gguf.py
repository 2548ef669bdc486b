"""llama.cpp and the gguf package: files written here dequantize to the same weights there, and generate the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from counterparts.counterpart import (
    GGUF_SETTINGS,
    clear_prompt,
    needed,
    prompt_file,
    quantized_llama,
    quantized_qwen2,
    run,
    wide_llama,
)
from safetensors.torch import load_file

import awq_ext

TOKENS = torch.arange(64)[None]
pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")


@pytest.mark.parametrize("kind", [*GGUF_SETTINGS, "Qwen2"])
def test_llama_cpp_generates_the_same_tokens(kind: str, tmp_path: Path) -> None:
    """Qwen2: with biases, and rows in the order of transformers."""
    needed("llama-cpp")
    model = quantized_qwen2(group_size=32) if kind == "Qwen2" else quantized_llama(**GGUF_SETTINGS[kind])
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="gguf")
    (prompt, generated), out = clear_prompt(tmp_path, model), tmp_path / "out.safetensors"
    run("llama-cpp", "llama_cpp_generate.py", folder / "model.gguf", prompt, out)
    theirs = load_file(out)
    assert torch.equal(generated, theirs["generated"])
    with torch.no_grad():
        ours = model(load_file(prompt)["tokens"]).logits
    # its products of integers round activations to 8 bits in groups of 32, and keys and values to float16
    assert (ours - theirs["logits"]).norm() < 0.02 * ours.norm()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_files_of_its_own_quantizer_are_read_by_themselves(kind: str, tmp_path: Path) -> None:
    """Embedding and layers of blocks, negative scales, in Q4_0 a head of Q6_K, which becomes float: the same logits to rounding."""
    needed("llama-cpp")
    few = {"only": ("*.0.*.o_proj",), "bits": 8, "symmetric": True, "group_size": 32, "method": "rtn", "fold": "never"}
    made = awq_ext.save_pretrained(
        awq_ext.quantize(wide_llama().half(), [TOKENS], **few), tmp_path / "x", format="gguf"
    )
    file, out, prompt = tmp_path / "theirs.gguf", tmp_path / "out.safetensors", prompt_file(tmp_path)
    run("llama-cpp", "llama_cpp_quantize.py", made / "model.gguf", file, kind)
    run("llama-cpp", "llama_cpp_generate.py", file, prompt, out)
    if kind == "Q4_0":
        with pytest.warns(UserWarning, match=r"theirs\.gguf: dequantized to floats, .*: output\.weight \(Q6_K\)$"):
            model = awq_ext.from_pretrained(file)
    else:
        model = awq_ext.from_pretrained(file)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, awq_ext.QuantLinear)}
    assert len(layers) == 7 * model.config.num_hidden_layers + (kind == "Q8_0")
    # written here, with scales of both signs; it stays as it is where it is Q8_0 already
    layers.pop("model.layers.0.self_attn.o_proj")
    assert any(bool((layer.scales < 0).any()) for layer in layers.values()) == (kind == "Q4_0")
    with torch.no_grad():
        ours = model(load_file(prompt)["tokens"]).logits
    assert (ours - load_file(out)["logits"]).norm() < 0.02 * ours.norm()
