"""MLX and mlx-lm: directories written here dequantize to the same weights there, and generate the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from counterparts.counterpart import (
    clear_prompt,
    needed,
    prompt_file,
    quantized_llama,
    read_by,
    run,
    trained_llama,
    weights_of,
)
from quantized_dirs import random_layer
from safetensors.torch import load_file, save_file
from tiny_transformers import BATCH, MOE, float_model, transformers
from torch import nn
from ways import layers_of, write_all

import awq_ext
from awq_ext.checkpoints.formats import LAYOUTS
from awq_ext.checkpoints.formats.runtimes.mlx import KNOWN
from awq_ext.demo.data import calibration_batches


def test_mlx_dequantizes_to_the_same_weights(tmp_path: Path) -> None:
    """All widths, sizes of groups and dtypes: equal where symmetric with scales of 16 bits, else within the bound of the docs."""
    needed("mlx")
    cases: list[tuple[Any, ...]] = [(bits, size) for bits in (4, 8) for size in (32, 64, 128, 256, -1)]
    layers = {
        f"{bits} {size} {symmetric} {dtype}": random_layer(24, 512, size, symmetric, dtype, bits=bits)
        for bits, size in cases
        for symmetric in (True, False)
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
        if symmetric or bits == 4 or dtype != torch.bfloat16
    }
    tensors, metadata = {}, {}
    for name, layer in layers.items():
        assert LAYOUTS["mlx"].problems(name, layer) == []
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in LAYOUTS["mlx"].pack(layer).items()}
        metadata[name] = f"{512 // tensors[f'{name}.scales'].shape[1]} {layer.bits}"
    save_file(tensors, tmp_path / "layers.safetensors", metadata=metadata)
    run("mlx", "mlx_weights.py", tmp_path / "layers.safetensors", tmp_path / "weights.safetensors")
    theirs = load_file(tmp_path / "weights.safetensors")
    assert theirs.keys() == layers.keys()
    for name, layer in layers.items():
        if layer.symmetric and layer.scales.dtype != torch.float32:
            assert torch.equal(theirs[name], layer.dequantize()), name
            continue
        repeats = layer.in_features // layer.groups
        steps, zeros = (t.double().repeat_interleave(repeats, 1) for t in (layer.scales, layer.zeros))
        error = (theirs[name].double() - (layer.codes().double() - zeros) * steps).abs() / steps
        unit = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}[layer.scales.dtype]
        # it multiplies and adds in float32 itself
        assert (error <= zeros * unit + 2 * (1 << layer.bits) * 2**-24).all(), name


def test_mlx_lm_loads_every_way_to_quantize(tmp_path: Path) -> None:
    """All that docs/formats.md says the layout holds, as directories; equal, or within the bound of the docs, as above."""
    needed("mlx")
    models = write_all(tmp_path, "mlx", torch.float16)
    for folder, theirs in read_by("mlx", "mlx_read.py", models).items():
        layers = layers_of(models[folder])
        assert theirs.keys() == layers.keys()
        for name, weight in weights_of(models[folder], torch.float32).items():
            if "symmetric" in folder.name:
                assert torch.equal(theirs[name], weight), (folder.name, name)
                continue
            repeats = layers[name].in_features // layers[name].scales.shape[1]
            steps, zeros = (t.float().repeat_interleave(repeats, 1) for t in (layers[name].scales, layers[name].zeros))
            bound = zeros * 2**-11 + 2 * (1 << layers[name].bits) * 2**-24
            assert ((theirs[name] - weight).abs() <= steps * bound * 1.001).all(), (folder.name, name)


SETTINGS: dict[str, dict[str, Any]] = {
    "symmetric": {"symmetric": True},
    "zeros": {"group_size": 32},
    "8 bits": {"bits": 8},
    "mixed": {
        "head": "int8",
        "per_layer": {"*.down_proj": {"bits": 8, "group_size": 32}},
        "skip": ("*.0.self_attn.*",),
    },
}


def assert_same_tokens(model: nn.Module, tmp_path: Path) -> None:
    """mlx-lm takes the very layers for quantized that are, and generates what ``model`` does; logits within 1 %."""
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="mlx")
    (prompt, generated), out = clear_prompt(tmp_path, model), tmp_path / "out.safetensors"
    said = run("mlx", "mlx_generate.py", folder, prompt, out).splitlines()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, awq_ext.QuantLinear)}
    kinds = {f"{name} QuantizedLinear {layer.group_size} {layer.bits}" for name, layer in layers.items()}
    assert {line for line in said if "Quantized" in line} == kinds
    theirs = load_file(out)
    assert torch.equal(generated, theirs["generated"])
    with torch.no_grad():
        ours = model(load_file(prompt)["tokens"]).logits
    assert (ours - theirs["logits"]).norm() < 0.01 * ours.norm()


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_mlx_lm_generates_the_same_tokens(kind: str, tmp_path: Path) -> None:
    needed("mlx")
    assert_same_tokens(quantized_llama(**SETTINGS[kind]), tmp_path)


def test_mlx_lm_generates_the_same_tokens_of_a_qwen2(tmp_path: Path) -> None:
    """The trained Llama with the biases of a Qwen2, which quantizing fills."""
    needed("mlx")
    llama = trained_llama()
    config = {key: value for key, value in llama.config.to_dict().items() if key not in ("architectures", "model_type")}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config)).eval()
    odd = model.load_state_dict(llama.state_dict(), strict=False)
    assert odd.missing_keys and all(name.endswith("bias") for name in odd.missing_keys)
    for name in odd.missing_keys:
        nn.init.zeros_(model.get_parameter(name))
    awq_ext.quantize(model, calibration_batches(count=4), group_size=64, fold="always", progress=False)
    assert model.model.layers[0].self_attn.v_proj.bias.abs().max() > 0
    assert_same_tokens(model, tmp_path)


def test_mlx_lm_runs_a_model_that_was_tied(tmp_path: Path) -> None:
    """In float16 throughout, with a head of 4 bits apart from the embedding."""
    needed("mlx")
    model = quantized_llama(torch.float16, tied=True, head="int4", method="rtn")
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="mlx")
    prompt, out = prompt_file(tmp_path), tmp_path / "out.safetensors"
    said = run("mlx", "mlx_generate.py", folder, prompt, out)
    assert "lm_head QuantizedLinear" in said
    with torch.no_grad():
        ours = model(load_file(prompt)["tokens"]).logits.float()
    assert (ours - load_file(out)["logits"]).norm() < 0.02 * ours.norm()


# what of a family is not as in a Llama, so that all sizes are small
FAMILIES: dict[str, dict[str, Any]] = {
    "Mistral": {},
    "Mixtral": {"num_local_experts": 4},
    "Qwen2": {},
    "Qwen2Moe": MOE | {"num_experts": 4, "shared_expert_intermediate_size": 64},
    "Qwen3": {"head_dim": 16},
    "Phi": {},
    "Phi3": {"pad_token_id": 0},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16},
    "Granite": {},
    "Olmo2": {},
    "StableLm": {},
    "Starcoder2": {},
    "Cohere": {},
    "SmolLM3": {"pad_token_id": 0},
}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_mlx_lm_runs_all_families_that_are_written(family: str, tmp_path: Path) -> None:
    needed("mlx")
    model = float_model(family, **NO_TOKENS | FAMILIES[family])
    assert model.config.model_type in KNOWN
    awq_ext.quantize(model, [BATCH], group_size=32, method="rtn", fold="always", progress=False)
    folder = awq_ext.save_pretrained(model, tmp_path / "model", format="mlx")
    prompt, out = prompt_file(tmp_path, bytes(range(3, 60, 3))), tmp_path / "out.safetensors"
    run("mlx", "mlx_generate.py", folder, prompt, out)
    with torch.no_grad():
        ours = model(load_file(prompt)["tokens"]).logits
    assert (ours - load_file(out)["logits"]).norm() < 0.01 * ours.norm()


def test_what_mlx_quantized_is_read(tmp_path: Path) -> None:
    """Within two roundings of scale and bias, as a warning says; 8 bits in bfloat16 are refused."""
    needed("mlx")
    out = tmp_path / "out.safetensors"
    run("mlx", "mlx_quantize.py", out)
    tensors = load_file(out)
    for bits, dtype in ((4, "float16"), (4, "bfloat16"), (4, "float32"), (8, "float16"), (8, "float32")):
        layer = {leaf: tensors[f"{dtype}.{bits}.{leaf}"] for leaf in ("weight", "scales", "biases")}
        settings = LAYOUTS["mlx"].reads({"group_size": 64, "bits": bits, "mode": "affine"})
        with pytest.warns(UserWarning, match="biases that MLX's own quantizer rounded"):
            ours = LAYOUTS["mlx"].unpack(layer, settings)
        assert ours.bits == bits and (ours.scales < 0).any()
        error = (ours.dequantize().double() - tensors[f"{dtype}.{bits}.dequantized"].double()).abs()
        steps, zeros = (t.double().repeat_interleave(64, 1) for t in (ours.scales.abs(), ours.zeros))
        unit = torch.finfo(ours.scales.dtype).eps / 2
        # it multiplies and adds in float32 itself
        assert (error <= steps * (2 * zeros * unit * 1.02 + 2 * (1 << bits) * 2**-24)).all(), (bits, dtype)
    layer = {leaf: tensors[f"bfloat16.8.{leaf}"] for leaf in ("weight", "scales", "biases")}
    with pytest.raises(awq_ext.CheckpointError, match="bfloat16 does not tell which"):
        LAYOUTS["mlx"].unpack(layer, LAYOUTS["mlx"].reads({"group_size": 64, "bits": 8}))
