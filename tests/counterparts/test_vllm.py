"""vLLM's CPU backend: directories written here are served, and generate what they generate here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from counterparts.counterpart import (
    byte_tokenizer,
    clear_prompt,
    needed,
    quantized_llama,
    quantized_qwen2,
    run,
    wide_llama,
)
from safetensors.torch import load_file
from typer.testing import CliRunner

import awq_ext
from awq_ext import cli
from awq_ext.demo.data import text

LAYOUTS = pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])


@LAYOUTS
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_vllm_generates_the_same_tokens(layout: str, symmetric: bool, group_size: int, tmp_path: Path) -> None:
    needed("vllm")
    assert_same_tokens(quantized_llama(symmetric=symmetric, group_size=group_size), layout, tmp_path)


def test_vllm_serves_gptq_without_zero_points_alone(tmp_path: Path) -> None:
    """Which is why it is not named among those that load such directories."""
    needed("vllm")
    assert_same_tokens(quantized_llama(symmetric=True), "gptq", tmp_path / "symmetric")
    with pytest.raises(AssertionError, match="Unsupported quantization config: bits=4, sym=False"):
        assert_same_tokens(quantized_llama(), "gptq", tmp_path / "zero points")


def test_vllm_generates_the_same_tokens_with_qwen2(tmp_path: Path) -> None:
    """It joins the biases of q, k and v."""
    needed("vllm")
    assert_same_tokens(quantized_qwen2(), "awq", tmp_path)


@LAYOUTS
def test_vllm_leaves_the_same_layers_float(layout: str, tmp_path: Path) -> None:
    needed("vllm")
    assert_same_tokens(quantized_llama(skip=("lm_head", "*.layers.0.*")), layout, tmp_path)


ROWS = {"bits": 8, "group_size": -1, "symmetric": True}


@pytest.mark.parametrize(
    "settings",
    [
        {"per_layer": {"*.down_proj": ROWS, "*.layers.1.self_attn.[qkv]_proj": ROWS}},
        {"symmetric": True, "per_layer": {"*.layers.0.mlp.*": ROWS}},
        ROWS,
        {"head": "int8", "per_layer": {"*.down_proj": ROWS, "lm_head": ROWS}},
    ],
    ids=["joined layers", "symmetric", "8 bits", "head"],
)
def test_vllm_serves_layers_of_eight_bits_with_rounded_activations(settings: dict[str, Any], tmp_path: Path) -> None:
    needed("vllm")
    model = quantized_llama(**settings)
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="compressed-tensors-w8a8", verify=True)
    # in float16 its kernel for AMX ends with "scale_C: scalar path not implemented!"
    output = assert_generates(folder, awq_ext.from_pretrained(folder), tmp_path, VLLM_DTYPE="bfloat16")
    assert "CPUInt8ScaledMMLinearKernel for CompressedTensorsW8A8Int8" in output
    assert ("CPUWNA16LinearKernel for CompressedTensorsWNA16" in output) == (settings is not ROWS)


@pytest.mark.filterwarnings("ignore")  # of transformers, at import
def test_vllm_serves_what_the_command_writes_by_default(tmp_path: Path) -> None:
    """``awq-ext quantize MODEL OUT --calib TEXT`` with no other option: method, layout, groups and dtype are the defaults.

    So is vLLM's dtype, in which it rounds activations to 8 bits where there is AMX.
    """
    needed("vllm")
    wide_llama().save_pretrained(tmp_path / "float")
    byte_tokenizer().save_pretrained(tmp_path / "float")
    calib = tmp_path / "calib.txt"
    calib.write_bytes(text("calibration")[:200_000].decode(errors="ignore").encode())
    shown = CliRunner().invoke(
        cli.app, ["quantize", f"{tmp_path / 'float'}", f"{tmp_path / 'int4'}", "--calib", f"{calib}"]
    )
    assert shown.exit_code == 0 and f"vLLM: vllm serve {tmp_path / 'int4'}" in shown.output, shown.output
    assert_generates(tmp_path / "int4", awq_ext.from_pretrained(tmp_path / "int4"), tmp_path, VLLM_DTYPE="bfloat16")


def assert_same_tokens(model: torch.nn.Module, layout: str, tmp_path: Path) -> None:
    assert_generates(awq_ext.save_pretrained(model, tmp_path / "model", format=layout), model, tmp_path)


def assert_generates(folder: Path, model: torch.nn.Module, tmp_path: Path, **variables: str) -> str:
    """Returns what vLLM printed."""
    (prompt, generated), out = clear_prompt(tmp_path, model), tmp_path / "out.safetensors"
    output = run("vllm", "vllm_generate.py", folder, prompt, out, **variables)
    assert torch.equal(generated, load_file(out)["generated"])
    return output
