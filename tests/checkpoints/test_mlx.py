"""MLX: how biases are rounded, groups that it lacks, directories there and back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_directory
import pytest
import torch
from counterparts.test_mlx import FAMILIES
from quantized_dirs import edit_json, edit_tensors, random_layer
from safetensors.torch import load_file
from tiny_transformers import BATCH, MOE, float_model, logits, transformers
from typer.testing import CliRunner

import awq_ext
from awq_ext.checkpoints.formats import LAYOUTS, CheckpointError, Facts, PackedLinear, Summary
from awq_ext.checkpoints.formats.runtimes.mlx import KNOWN
from awq_ext.checkpoints.quantized_dir import QuantDir
from awq_ext.cli import app

MLX = LAYOUTS["mlx"]
UNITS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
SETTINGS: dict[str, Any] = {"group_size": 32, "method": "rtn", "fold": "always", "progress": False}


def there_and_back(layer: PackedLinear) -> PackedLinear:
    """Through the tensors, and a config that went through JSON."""
    assert MLX.problems("layer", layer) == []
    config = json.loads(json.dumps(MLX.quantization_config(Summary({"layer": Facts.of(layer)}))))
    return MLX.unpack(MLX.pack(layer), MLX.reads(config).of("layer"))


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 96, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", list(UNITS))
def test_codes_scales_and_zeros_there_and_back(dtype: torch.dtype, bits: int, symmetric: bool, group_size: int) -> None:
    """Biases are within the bound of the docs, exact where symmetric; groups that MLX lacks become several."""
    if (dtype, bits, symmetric) == (torch.bfloat16, 8, False):
        return  # mostly refused: test_zeros_that_bfloat16_cannot_tell_apart
    layer = random_layer(24, 768, group_size, symmetric, dtype, bits=bits, bias=True)
    back, length = there_and_back(layer), 768 // layer.groups
    assert back.group_size == {256: 128, 96: 32, 768: 128}.get(length, length)
    assert torch.equal(back.codes(), layer.codes()) and torch.equal(back.bias, layer.bias)
    assert torch.equal(back.dequantize(), layer.dequantize())
    repeats = length // back.group_size
    assert torch.equal(back.scales, layer.scales.repeat_interleave(repeats, 1))
    assert torch.equal(back.zeros, layer.zeros.repeat_interleave(repeats, 1))
    tensors = MLX.pack(layer)
    assert {tensors[leaf].dtype for leaf in ("scales", "biases")} == {dtype}
    exact = -back.zeros.double() * back.scales.double()
    error = (tensors["biases"].double() - exact).abs() / back.scales.double()
    assert (error <= back.zeros * UNITS[dtype]).all() and bool(error.any()) != symmetric


def test_weights_are_the_same_where_biases_are_exact() -> None:
    """By MLX's formula in fp32, where no product of 8 and 11 bits is rounded: symmetric, and scales of few bits."""
    coarse = random_layer(24, 256, 64)
    coarse.scales.copy_((coarse.scales.view(torch.int16) & ~15).view(torch.float16))  # seven significant bits
    for layer in (coarse, random_layer(24, 256, 64, True), random_layer(24, 256, 64, True, bits=8)):
        tensors = MLX.pack(layer)
        scales, biases = (tensors[leaf].float().repeat_interleave(64, 1) for leaf in ("scales", "biases"))
        assert torch.equal(layer.codes() * scales + biases, layer.dequantize())


def test_zeros_that_bfloat16_cannot_tell_apart() -> None:
    layer = random_layer(64, 256, 32, dtype=torch.bfloat16, bits=8)
    (problem,) = MLX.problems("layer", layer)
    assert "-zero * scale, rounded to bfloat16, leads to other zeros" in problem
    layer.zeros.clamp_(max=100)  # of which the product is off by less than half a step
    assert torch.equal(there_and_back(layer).zeros, layer.zeros)


@pytest.mark.parametrize("scale", [65504.0, 2.0**-24, 3 * 2.0**-24, 0.0])
def test_biases_at_the_ends_of_float16(scale: float) -> None:
    layer = random_layer(symmetric=True)
    layer.scales.fill_(scale)
    problems = MLX.problems("layer", layer)
    if scale == 65504.0:
        assert len(problems) == 1 and "leaves the range" in problems[0]
    else:
        assert torch.equal(there_and_back(layer).zeros, layer.zeros)


def test_biases_that_are_rounded_apart_from_scales() -> None:
    """As those of MLX's own quantizer: read with a warning, refused where two zeros would be as near."""
    layer = random_layer()
    settings, tensors = MLX.reads({"group_size": 32, "bits": 4}), MLX.pack(layer)
    true = layer.scales.double() * (1 + (torch.rand_like(layer.scales.double()) - 0.5) * 2.0**-11)
    assert torch.equal(true.half(), layer.scales)
    tensors["biases"] = (-layer.zeros.double() * true).half()
    with pytest.warns(UserWarning, match="biases that MLX's own quantizer rounded"):
        assert torch.equal(MLX.unpack(tensors, settings).zeros, layer.zeros)
    tensors["biases"].view(torch.int16).add_(40)
    with pytest.raises(CheckpointError, match="quantize the float model here instead"):
        MLX.unpack(tensors, settings)
    wide = random_layer(dtype=torch.bfloat16, bits=8)
    with pytest.raises(CheckpointError, match="bfloat16 does not tell which"):
        tensors_of_8 = MLX.pack(wide)
        tensors_of_8["biases"].view(torch.int16).add_(1)
        MLX.unpack(tensors_of_8, MLX.reads({"group_size": 32, "bits": 8}))
    for bias in (float("nan"), float("inf"), 1.0):
        tensors["biases"].fill_(bias)
        with pytest.raises(CheckpointError, match="zero from 0 to 15"):
            MLX.unpack(tensors, settings)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mixtral"])
def test_directories_there_and_back(family: str, tmp_path: Path) -> None:
    """Layers of 4 and 8 bits, with zeros and without, groups of two sizes, floats: the same logits, bit for bit."""
    model = float_model(family, torch.float16)
    eight = {"*.v_proj": {"bits": 8, "group_size": 64}, "*.o_proj": {"symmetric": True}}
    awq_ext.quantize(model, [BATCH], **SETTINGS, per_layer=eight, head="int8", skip=("*.0.*.q_proj",))
    with pytest.warns(UserWarning, match="neighbours are float"):
        folder = awq_ext.save_pretrained(model, tmp_path / "mlx", format="mlx", max_shard_size=30_000)
    config = json.loads((folder / "config.json").read_text())
    said = config["quantization"]
    assert said == config["quantization_config"] and config["tie_word_embeddings"] is False
    assert (said["bits"], said["group_size"], said["model.layers.0.self_attn.q_proj"]) == (4, 32, False)
    assert said["lm_head"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert said["model.layers.1.self_attn.v_proj"]["group_size"] == 64 and "model.layers.1.self_attn.o_proj" not in said
    assert torch.equal(logits(awq_ext.from_pretrained(folder)), logits(model))

    with pytest.warns(UserWarning, match="neighbours are float"):
        native = awq_ext.convert(folder, tmp_path / "ct", "compressed-tensors")
        again = awq_ext.convert(native, tmp_path / "again", "mlx")
    assert "quantization" not in json.loads((native / "config.json").read_text())
    assert torch.equal(logits(awq_ext.from_pretrained(native)), logits(model))
    first, second = (
        {n: t for f in at.glob("*.safetensors") for n, t in load_file(f).items()} for at in (folder, again)
    )
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(CheckpointError, match="holds a quantized checkpoint"):
        awq_ext.convert(native, again, "mlx")
    with pytest.raises(CheckpointError, match=r'transformers cannot write all .* format="mlx"'):
        awq_ext.from_pretrained(folder).save_pretrained(tmp_path / "theirs")


def saved(folder: Path, dtype: torch.dtype = torch.float16, **settings: Any) -> Path:
    model = float_model(dtype=dtype)
    awq_ext.quantize(model, [BATCH], **SETTINGS | settings)
    return awq_ext.save_pretrained(model, folder, format="mlx")


def test_a_directory_of_before_quantization_config(tmp_path: Path) -> None:
    folder = saved(tmp_path / "mlx")
    before = logits(awq_ext.from_pretrained(folder))
    edit_json(folder / "config.json", lambda config: config.pop("quantization_config") and None)
    assert torch.equal(logits(awq_ext.from_pretrained(folder)), before)
    with pytest.raises(CheckpointError, match="holds a quantized checkpoint"):
        saved(folder)


LAYER = "model.layers.0.mlp.up_proj"
DAMAGE: dict[str, tuple[Any, Any, str]] = {
    "bits of a layer": (lambda said: said.update({LAYER: {"bits": 6}}), None, "it has 6 bits"),
    "bits": (lambda said: said.update(bits=3), None, "it has 3 bits"),
    "float": (lambda said: said.update({LAYER: False}), None, "leaves it float, but the files hold it quantized"),
    "other bits": (lambda said: said.update({LAYER: {"bits": 8}}), None, "do not fit the group size 32"),
    "biases": (None, lambda tensors: tensors.pop(f"{LAYER}.biases"), "biases is missing"),
    "scales": (None, lambda tensors: tensors.pop(f"{LAYER}.scales"), "belongs to no layer of the mlx layout"),
    "rows": (
        None,
        lambda tensors: tensors.update({f"{LAYER}.scales": tensors[f"{LAYER}.scales"][1:].clone()}),
        "scales has shape",
    ),
}


@pytest.mark.parametrize("what", list(DAMAGE))
def test_damaged_directories_are_refused(what: str, tmp_path: Path) -> None:
    config, tensors, text = DAMAGE[what]
    folder = saved(tmp_path / "mlx")
    if config is not None:
        edit_json(folder / "config.json", lambda said: config(said["quantization_config"]))
    if tensors is not None:
        edit_tensors(folder, tensors)
    with pytest.raises(CheckpointError, match=text):
        awq_ext.from_pretrained(folder)


def test_models_that_were_not_tried_are_refused_by_name(tmp_path: Path) -> None:
    model = float_model("GPTNeoX")
    with pytest.raises(CheckpointError, match=r"model_type='gpt_neox' of config\.json is not among"):
        awq_ext.check_format(model, BATCH, "mlx", group_size=32, method="rtn")
    awq_ext.check_format(float_model(), BATCH, "mlx", group_size=32, method="rtn")
    awq_ext.quantize(model, [BATCH], **SETTINGS)
    with pytest.raises(CheckpointError, match="model_type='gpt_neox'"):
        awq_ext.save_pretrained(model, tmp_path / "model", format="mlx")
    assert not (tmp_path / "model").exists()


def test_activations_that_mlx_lm_would_not_compute_are_refused() -> None:
    model = float_model()
    model.config.hidden_act = "gelu"
    with pytest.raises(CheckpointError, match="hidden_act='gelu': mlx-lm's llama computes silu"):
        awq_ext.check_format(model, BATCH, "mlx", group_size=32, method="rtn")


def test_experts_that_mlx_lm_could_not_stack_are_refused(tmp_path: Path) -> None:
    model = float_model("Qwen2Moe", num_experts=4, shared_expert_intermediate_size=64, **MOE)
    awq_ext.quantize(model, [BATCH], **SETTINGS, skip=("*.1.mlp.experts.down_proj.2",))
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.experts.\*.down_proj are joined by mlx-lm"):
        awq_ext.save_pretrained(model, tmp_path / "model", format="mlx")


def test_two_dtypes_of_16_bits_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match='MLX then computes in float32.*scale_dtype="bfloat16"'):
        saved(tmp_path / "two", torch.bfloat16)
    folder = saved(tmp_path / "one", torch.bfloat16, scale_dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {
        torch.bfloat16,
        torch.uint32,
    }
    assert QuantDir(folder).layer(LAYER).scales.dtype == torch.bfloat16


def test_the_command_says_what_is_in_a_directory(tmp_path: Path) -> None:
    from awq_ext.cli.inspect import describe

    found = describe(saved(tmp_path / "mlx", head="int8"))
    assert found["format"] == "mlx" and found["quantized_layers"] == {"int4": 14, "int8": 1}
    assert found["quantization_config"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert found["loaded_by"][0]["program"] == "mlx-lm" and "note" not in found


def test_all_that_is_written_is_run_by_mlx_lm() -> None:
    """By tests/counterparts/test_mlx.py, for which Llamas are trained."""
    tried = {getattr(transformers, f"{family}Config").model_type for family in FAMILIES}
    assert {*KNOWN} == tried | {"llama"}


@pytest.mark.parametrize("format", ["mlx", "gguf"])
def test_the_commands_write_it(format: str, tmp_path: Path) -> None:
    """In groups of the size that a format has by default, or of 32 where only they fit; and one format becomes the other."""
    source, text = hf_directory.make(tmp_path / "float"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    settings = ["--calib", str(text), "--method", "rtn", "--samples", "2", "--seq-len", "32", "--set", "symmetric=true"]
    run = CliRunner().invoke
    done = run(app, ["quantize", str(source), str(tmp_path / "out"), "--format", format, *settings])
    # the widths are 64 and 96, and the usual size 128 but for gguf, whose blocks are 32
    assert ("groups of 32: 128" in done.output) == (format == "mlx")
    assert done.exit_code == 0, done.output
    other = {"mlx": "gguf", "gguf": "mlx"}[format]
    done = run(app, ["convert", str(tmp_path / "out"), str(tmp_path / "other"), "--format", other])
    assert done.exit_code == 0, done.output
    models = [awq_ext.from_pretrained(tmp_path / name) for name in ("out", "other")]
    assert torch.equal(*(logits(model, torch.arange(20)[None]) for model in models))
