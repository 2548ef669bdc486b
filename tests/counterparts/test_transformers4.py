"""Transformers 4's own from_pretrained on directories written here with Transformers 5: same layers to the bit, same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from counterparts.counterpart import assert_same_weights, needed, our_package_alone, run
from safetensors.torch import load_file, save_file
from torch import nn

import awq_ext
from awq_ext.checkpoints.quantized_dir import QuantDir

SETTINGS: dict[str, Any] = {"group_size": 16, "progress": False, "min_tokens": 1}
# float layers by name in config.json, which Transformers 4 takes for a reason to ask for AutoAWQ
FLOAT = ("lm_head", "*.layers.0.self_attn.[qkv]_proj")
TOKENS = torch.arange(2, 34).view(2, 16)


def quantized(name: str, **settings: Any) -> nn.Module:
    pytest.importorskip("transformers", reason="no counterpart tested: pip install awq-ext[hf]")
    case = architectures.make(name)
    return awq_ext.quantize(case.model, case.batches, **SETTINGS, **settings)


@pytest.mark.parametrize(
    ("name", "format", "dtype"),
    [
        ("Llama", "awq", "float32"),
        ("Llama", "native", "bfloat16"),
        ("Mixtral", "awq", "bfloat16"),
        ("Mixtral", "compressed-tensors", "float32"),
        ("Mixtral", "native", "bfloat16"),
        ("Llama 4", "native", "float32"),
        ("Llama 4", "native", "bfloat16"),
    ],
)
def test_what_was_written_here_loads_the_same(name: str, format: str, dtype: str, tmp_path: Path) -> None:
    """In bfloat16 too: its loader casts buffers, which would round scales of 16 bits to 8."""
    needed("autoawq")
    model = quantized(name, fold="always", skip=FLOAT, symmetric=format == "compressed-tensors")
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format=format)
    tokens, result = tmp_path / "tokens.safetensors", tmp_path / "result.safetensors"
    save_file({"tokens": TOKENS}, tokens)
    path = our_package_alone(tmp_path / "beside")
    run("autoawq", "transformers4_logits.py", folder, tokens, result, dtype, PYTHONPATH=str(path))
    theirs = load_file(result)
    logits = theirs.pop("logits")
    files = QuantDir(folder)  # by the names in the files, which are theirs: Transformers 5 joins experts
    assert_same_weights({layer: files.layer(layer).dequantize() for layer in files.layers}, theirs)
    ours = awq_ext.from_pretrained(folder, dtype=getattr(torch, dtype))
    with torch.no_grad():
        expected = ours(TOKENS).logits.float()
    # the float parts are other code: attention, norms and the order of experts, some tens of roundings one after another
    assert (logits - expected).norm() <= 32 * torch.finfo(getattr(torch, dtype)).eps * expected.norm()
