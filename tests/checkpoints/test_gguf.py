"""GGUF: blocks against the gguf package's own dequantization, names and row orders, files there and back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_dirs import random_layer
from tiny_transformers import float_model
from torch import Tensor

import awq_ext
from awq_ext.checkpoints.formats import LAYOUTS, CheckpointError, PackedLinear, Settings
from awq_ext.checkpoints.formats.runtimes.gguf import block_type

gguf = pytest.importorskip("gguf", reason="GGUF NOT TESTED: pip install awq-ext[gguf]")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}
BATCH = torch.arange(32)[None]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
}


def stored(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of each tensor of model.gguf."""
    tensors = gguf.GGUFReader(folder / "model.gguf").tensors
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in tensors}


def dequantized(layer: PackedLinear) -> Tensor:
    """What the package makes of a layer's blocks, fp32 [N, K]."""
    kind = gguf.GGMLQuantizationType[block_type(layer.bits, layer.symmetric)]
    return torch.from_numpy(gguf.dequantize(LAYOUTS["gguf"].pack(layer)["blocks"].flatten(1).numpy(), kind))


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_blocks_are_the_same_weights(bits: int, group_size: int) -> None:
    layer = random_layer(24, 128, group_size, symmetric=True, bits=bits)
    assert LAYOUTS["gguf"].problems("layer", layer) == []
    assert torch.equal(dequantized(layer), layer.dequantize().float())
    back = LAYOUTS["gguf"].unpack(LAYOUTS["gguf"].pack(layer), Settings((32,)))
    assert torch.equal(back.codes(), layer.codes()) and torch.equal(back.dequantize(), layer.dequantize())


def test_offsets_are_within_the_bound_and_exact_where_the_docs_say_so() -> None:
    layer = random_layer(200, 128, 32)
    steps = layer.scales.double().repeat_interleave(32, 1)
    zeros = layer.zeros.double().repeat_interleave(32, 1)
    exact = (layer.codes().double() - zeros) * steps
    error = (dequantized(layer).double() - exact).abs() / steps
    assert 0 < error.max() <= 15 * 2**-11 * 1.001  # the package adds in fp32
    assert error[(zeros == 1) | (zeros == 2) | (zeros == 4) | (zeros == 8)].max() < 2**-18
    coarse = layer.scales.clone().view(torch.int16) & ~15  # seven significant bits
    layer.scales.copy_(coarse.view(torch.float16))
    offsets = (-layer.zeros.float() * layer.scales.float()).half()
    assert torch.equal(offsets.double(), -layer.zeros.double() * layer.scales.double())
    back = LAYOUTS["gguf"].unpack(LAYOUTS["gguf"].pack(layer), Settings((32,)))
    assert torch.equal(back.zeros, layer.zeros)


def test_the_blocks_of_its_own_quantizer() -> None:
    """Negative scales in Q4_0, as llama.cpp has them, and all codes of Q8_0; offsets between codes in Q4_1 are refused."""
    weight = torch.randn(16, 128)
    for kind in ("Q4_0", "Q8_0"):
        blocks = torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])).unflatten(1, (4, -1))
        layer = LAYOUTS["gguf"].unpack({"blocks": blocks}, Settings((32,)))
        expected = gguf.dequantize(blocks.flatten(1).numpy(), gguf.GGMLQuantizationType[kind])
        codes = layer.codes().float() - (128 if kind == "Q8_0" else 8)
        assert torch.equal(codes * layer.scales.float().repeat_interleave(32, 1), torch.from_numpy(expected))
        assert (layer.scales < 0).any() == (kind == "Q4_0")
        linear = torch.nn.Linear(128, 16, bias=False, device="meta")
        x = torch.randn(5, 128)
        torch.testing.assert_close(
            awq_ext.QuantLinear.from_packed(linear, layer)(x), x @ torch.from_numpy(expected).T, rtol=1e-3, atol=1e-3
        )
    between = torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_1)).unflatten(1, (4, -1))
    with pytest.raises(CheckpointError, match="offsets lie between codes"):
        LAYOUTS["gguf"].unpack({"blocks": between}, Settings((32,)))


@pytest.mark.parametrize("scale", [65504.0, 2.0**-24])
def test_offsets_at_the_ends_of_float16(scale: float) -> None:
    layer = random_layer()
    layer.scales.fill_(scale)
    problems = LAYOUTS["gguf"].problems("layer", layer)
    assert bool(problems) == (scale == 65504.0)
    if not problems:
        back = LAYOUTS["gguf"].unpack(LAYOUTS["gguf"].pack(layer), Settings((32,)))
        assert torch.equal(back.zeros, layer.zeros)


def test_rows_of_queries_and_keys_are_where_llama_cpp_turns_them() -> None:
    from awq_ext.checkpoints.gguf.architecture import Architecture

    known = Architecture(CONFIG)
    order = known.rows("model.layers.0.self_attn.q_proj", 64)
    assert order is not None and order[:6].tolist() == [0, 8, 1, 9, 2, 10] and order[16] == 16
    assert torch.equal(order[known.rows("model.layers.0.self_attn.q_proj", 64, back=True)], torch.arange(64))
    assert known.rows("model.layers.0.self_attn.k_proj", 32)[:3].tolist() == [0, 8, 1]
    assert known.rows("model.layers.0.self_attn.v_proj", 32) is None
    assert Architecture(CONFIG | {"architectures": ["Qwen2ForCausalLM"]}).rows("a.self_attn.q_proj", 64) is None
    assert known.places()["model.layers.1.mlp.down_proj"].name == "blk.1.ffn_down"


def test_the_frequencies_of_llama_3_are_transformers_own() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from awq_ext.checkpoints.gguf.architecture import Architecture

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    rope["original_max_position_embeddings"] = 8192
    config = CONFIG | {"head_dim": 128, "rope_parameters": rope}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**config, max_position_embeddings=131072), "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    factors = Architecture(config).tensors()["rope_freqs.weight"]
    torch.testing.assert_close(plain / factors, scaled, rtol=1e-5, atol=0)
    assert factors.unique().numel() > 3


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"architectures": ["HeliumForCausalLM"]}, "GGUF files of HeliumForCausalLM"),
    "rotary embeddings": ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
    "no size": ({"num_hidden_layers": None}, "num_hidden_layers=None"),
    "windows": (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
        "use_sliding_window=True is not known here: llama.cpp's qwen2 computes with False",
    ),
    "windows of Mistral": (
        {"architectures": ["MistralForCausalLM"], "sliding_window": 16, "max_position_embeddings": 32},
        "sliding_window=16: llama.cpp's llama attends to all tokens",
    ),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_is_not_known_is_refused(what: str) -> None:
    from awq_ext.checkpoints.gguf.architecture import Architecture

    change, text = REFUSED[what]
    with pytest.raises(CheckpointError, match=text):
        Architecture(CONFIG | change)


def test_a_window_that_holds_every_text_is_none() -> None:
    from awq_ext.checkpoints.gguf.architecture import Architecture

    window = {"sliding_window": 32, "max_position_embeddings": 32}
    assert Architecture(CONFIG | window | {"architectures": ["MistralForCausalLM"]}).name == "llama"
    assert Architecture(CONFIG | {"sliding_window": 16, "use_sliding_window": False}).name == "llama"  # as of a Qwen2


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_files_there_and_back(family: str, tmp_path: Path) -> None:
    """Symmetric and not, 4 and 8 bits, half a block float, in float16: the same logits, bit for bit, and a conversion too."""
    model = float_model(family, torch.float16, **SIZES)
    settings = {"group_size": 32, "method": "rtn", "fold": "always", "skip": ("*.layers.0.self_attn.*",)}
    eight = {"*.layers.1.mlp.down_proj": {"bits": 8, "symmetric": True}}
    awq_ext.quantize(model, [BATCH], settings | {"symmetric": True, "per_layer": eight}, progress=False)
    folder = awq_ext.save_pretrained(model, tmp_path / "gguf", format="gguf")
    back = awq_ext.from_pretrained(folder)
    assert torch.equal(model(BATCH).logits, back(BATCH).logits)
    native = awq_ext.convert(folder, tmp_path / "native", "native")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]  # as it lies beside a file that llama.cpp's converter made
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(model(BATCH).logits, awq_ext.from_pretrained(folder)(BATCH).logits)
    again = awq_ext.convert(native, tmp_path / "again", "gguf")
    assert torch.equal(model(BATCH).logits, awq_ext.from_pretrained(native)(BATCH).logits)
    first, second = stored(folder), stored(again)
    assert first.keys() == second.keys() and all(first[name] == second[name] for name in first)
    assert {first[f"blk.1.{leaf}.weight"][0] for leaf in ("attn_q", "ffn_down")} == {"Q4_0", "Q8_0"}
    assert sorted(file.name for file in again.iterdir() if file.suffix in (".gguf", ".safetensors")) == ["model.gguf"]
    with pytest.raises(CheckpointError, match="holds a quantized checkpoint"):
        awq_ext.convert(native, again, "gguf")
    (folder / "model.gguf").write_bytes((folder / "model.gguf").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged"):
        awq_ext.from_pretrained(folder)


def test_the_command_says_what_is_in_a_file(tmp_path: Path) -> None:
    from awq_ext.cli.inspect import describe

    model = float_model(**SIZES)
    settings = {"group_size": 32, "method": "rtn", "fold": "always", "symmetric": True, "head": "int8"}
    awq_ext.quantize(model, [BATCH], settings, progress=False)
    found = describe(awq_ext.save_pretrained(model, tmp_path / "x", format="gguf"))
    assert found["format"] == "gguf" and found["tensors"]["Q8_0"]["tensors"] == 1
    assert found["tensors"]["Q4_0"]["tensors"] == 14 and "note" not in found
    assert found["quantized_layers"] == {"int4": 14, "int8": 1}
    assert found["loaded_by"][0]["program"] == "llama.cpp"


def test_an_architecture_without_names_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = float_model("Helium", **SIZES)
    with pytest.raises(CheckpointError, match="GGUF files of HeliumForCausalLM"):
        awq_ext.check_format(model, BATCH, "gguf", group_size=32, method="rtn")
    awq_ext.check_format(float_model(**SIZES), BATCH, "gguf", group_size=32, method="rtn")
    awq_ext.quantize(model, [BATCH], {"group_size": 32, "method": "rtn", "fold": "always"}, progress=False)
    with pytest.raises(CheckpointError, match="GGUF files of HeliumForCausalLM"):
        awq_ext.save_pretrained(model, tmp_path / "model", format="gguf")
    assert not (tmp_path / "model").exists()
