"""compressed-tensors-w8a8: layers of 8 bits as plain integers, whose readers round the activations too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_dirs import edit_json, random_layer
from safetensors.torch import load_file, save_file
from tiny_transformers import BATCH, float_model, load, logits, registered  # noqa: F401
from torch import nn

import awq_ext
from awq_ext import CheckpointError, QuantLinear
from awq_ext.checkpoints.formats import LAYOUTS, Facts, PackedLinear, Summary
from awq_ext.checkpoints.joined import join_layers
from awq_ext.checkpoints.quantized_dir import QuantDir

NAME = "compressed-tensors-w8a8"
ROWS = {"bits": 8, "group_size": -1, "symmetric": True}
DOWN = {"*.down_proj": ROWS}


def quantized(**settings: Any) -> nn.Module:
    """A random Llama in int4 with zero points, and W8 where asked for."""
    chosen = {"group_size": 32, "fold": "always", "method": "rtn", "progress": False, "per_layer": DOWN}
    return awq_ext.quantize(float_model("Llama", attention_bias=True), [BATCH], **(chosen | settings))


def layers_of(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = layers_of(one), layers_of(other)
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        for leaf in ("qweight", "scales", "zeros"):
            assert torch.equal(getattr(layer, leaf), getattr(theirs[name], leaf)), (name, leaf)


def rounding(model: nn.Module) -> set[str]:
    return {name for name, layer in layers_of(model).items() if layer.compute == "int8"}


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


# --- what is written ------------------------------------------------------------------------------------------------------


def test_every_element_is_where_the_format_says() -> None:
    layer = random_layer(16, 40, -1, symmetric=True, bias=True, bits=8)
    tensors = LAYOUTS[NAME].pack(layer)
    assert tensors.keys() == {"weight", "weight_scale", "bias"}
    assert tensors["weight"].dtype == torch.int8 and tensors["weight_scale"].shape == (16, 1)
    codes, weight = layer.codes(), layer.dequantize()
    for n in range(16):
        for k in range(40):
            assert int(tensors["weight"][n, k]) == int(codes[n, k]) - 128
            assert float(tensors["weight"][n, k]) * float(tensors["weight_scale"][n, 0]) == float(weight[n, k])


def test_the_config_has_a_scheme_for_each_width(tmp_path: Path) -> None:
    """As compressed-tensors 0.17 to 0.19 and vLLM 0.32 read them; formats of groups count where there are several."""
    found = settings(awq_ext.save_pretrained(quantized(), tmp_path / "x", format=NAME))
    four, eight = found["config_groups"].values()
    assert (found["quant_method"], found["format"]) == ("compressed-tensors", "mixed-precision")
    assert (four["format"], eight["format"]) == ("pack-quantized", "int-quantized")
    assert four["input_activations"] is None and not four["weights"]["symmetric"]
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    assert eight["input_activations"] == tokens
    assert eight["weights"] | {"num_bits": 8, "symmetric": True, "strategy": "channel"} == eight["weights"]
    assert eight["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    whole = settings(awq_ext.save_pretrained(quantized(per_layer={}, **ROWS), tmp_path / "y", format=NAME))
    assert whole["format"] == "int-quantized" and whole["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_a_model_without_layers_of_eight_bits_is_what_compressed_tensors_is(tmp_path: Path) -> None:
    model = quantized(per_layer={})
    folders = [awq_ext.save_pretrained(model, tmp_path / name, format=name) for name in (NAME, "compressed-tensors")]
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert QuantDir(folders[0]).layout.name == "compressed-tensors"
    assert torch.equal(logits(awq_ext.from_pretrained(folders[0])), logits(model))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"group_size": 32}, "it has 8 bits with groups of 32"),
        ({"symmetric": False}, "it has 8 bits with zero points"),
    ],
)
def test_what_cannot_be_written_so_is_refused_with_the_way_out(
    fields: dict[str, Any], text: str, tmp_path: Path
) -> None:
    per_layer = {"*.down_proj": ROWS | fields}
    with pytest.raises(CheckpointError, match=text) as before:
        awq_ext.check_format(float_model("Llama"), BATCH, NAME, group_size=32, method="rtn", per_layer=per_layer)
    with pytest.raises(CheckpointError, match=text) as after:
        awq_ext.save_pretrained(quantized(per_layer=per_layer), tmp_path / "x", format=NAME)
    for said in map(str, (before.value, after.value)):
        assert '{"bits": 8, "group_size": -1, "symmetric": True}' in said and 'format="compressed-tensors"' in said
    assert not (tmp_path / "x").exists()
    awq_ext.check_format(float_model("Llama"), BATCH, NAME, group_size=32, method="rtn", per_layer=DOWN)


# --- read again -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [{}, {"symmetric": True}, {"head": "int8", "per_layer": DOWN | {"lm_head": ROWS}}])
def test_codes_and_scales_come_back_and_the_file_decides_how_they_are_computed(
    chosen: dict[str, Any], tmp_path: Path
) -> None:
    model = quantized(**chosen)
    folder = awq_ext.save_pretrained(model, tmp_path / "x", format=NAME, max_shard_size="20KB", verify=True)
    again = awq_ext.from_pretrained(folder)
    assert_same_weights(model, again)
    eight = {name for name, layer in layers_of(model).items() if layer.bits == 8}
    assert rounding(model) == set() and rounding(again) == eight != set()
    for name in eight:
        model.get_submodule(name).compute = "int8"
    expected = logits(model)
    assert torch.equal(logits(again), expected)
    awq_ext.set_compute_dtype(again, "auto")
    assert not torch.equal(logits(again), expected)


def test_other_layouts_and_back(tmp_path: Path) -> None:
    """Weights stay what they are; only where files say so are activations rounded."""
    model = quantized()
    packed = awq_ext.save_pretrained(model, tmp_path / "packed", format="compressed-tensors")
    integers = awq_ext.convert(packed, tmp_path / "integers", format=NAME, verify=True)
    assert (tmp_path / "integers" / "README.md").exists() and QuantDir(integers).layout.name == NAME
    back = awq_ext.convert(integers, tmp_path / "back", format="compressed-tensors", verify=True)
    own = awq_ext.convert(integers, tmp_path / "own", format="native", verify=True)
    for folder in (integers, back, own):
        again = awq_ext.from_pretrained(folder)
        assert_same_weights(model, again)
        assert (rounding(again) != set()) == (folder == integers)
    one, other = (load_file(folder / "model.safetensors") for folder in (packed, back))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.usefixtures("registered")
def test_transformers_loads_and_saves_it_through_our_registration(tmp_path: Path) -> None:
    awq_ext.register_with_transformers(("compressed-tensors",))
    model = quantized()
    folder = awq_ext.save_pretrained(model, tmp_path / "x", format=NAME)
    loaded = load(folder)
    assert_same_weights(model, loaded)
    assert rounding(loaded) == set(rounding(awq_ext.from_pretrained(folder))) != set()
    loaded.save_pretrained(tmp_path / "again")
    assert settings(tmp_path / "again")["format"] == "mixed-precision"
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path / "again")), logits(loaded))


# --- what other tools write -----------------------------------------------------------------------------------------------


def written_by_llm_compressor(folder: Path, layer: PackedLinear, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A directory of its scheme W8A8, with every entry that compressed-tensors 0.19 writes."""
    noted = {"block_structure": None, "actorder": None, "scale_dtype": None, "zp_dtype": None, "observer_kwargs": {}}
    rows = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "group_size": None,
        "strategy": "channel",
        "dynamic": False,
    }
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": rows | noted | {"observer": "memoryless_minmax"},
        "input_activations": tokens | noted | {"observer": None},
        "output_activations": None,
        "format": "int-quantized",
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    change(group)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    tensors = {"weight": (layer.codes().int() - 128).to(torch.int8), "weight_scale": layer.scales}
    if not layer.symmetric:
        tensors["weight_zero_point"] = (layer.zeros.int() - 128).to(torch.int8)
    save_file({f"a.up.{leaf}": tensor for leaf, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("symmetric", [True, False])
def test_directories_of_llm_compressor_are_read(symmetric: bool, tmp_path: Path) -> None:
    layer = random_layer(16, 40, -1, symmetric, torch.bfloat16, bits=8)
    found = QuantDir(written_by_llm_compressor(tmp_path / "x", layer, lambda group: None))
    assert found.layout.name == NAME and found.bits("a.up") == 8 and found.rows("a.up") == 16
    again = found.layer("a.up")
    assert again.compute == "int8"
    for leaf in ("qweight", "scales", "zeros"):
        assert torch.equal(getattr(layer, leaf), getattr(again, leaf))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activations by one scale that is stored": ({"strategy": "tensor", "dynamic": False}, "'strategy': 'tensor'"),
    "activations with zero points": ({"symmetric": False}, "'symmetric': False"),
    "activations in groups": ({"strategy": "group", "group_size": 128}, "'strategy': 'group'"),
    "activations in 4 bits": ({"num_bits": 4}, "'num_bits': 4"),
    "float activations": ({"type": "float"}, "'type': 'float'"),
    "something new": ({"rotation": "R1"}, "rotation='R1' is not known to awq_ext"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_activations_that_are_rounded_otherwise_are_refused_with_their_value(what: str, tmp_path: Path) -> None:
    more, text = REFUSED[what]
    layer = random_layer(16, 40, -1, True, bits=8)
    folder = written_by_llm_compressor(tmp_path / "x", layer, lambda group: group["input_activations"].update(more))
    with pytest.raises(CheckpointError, match=f"config_groups\\['group_0'\\].input_activations.*{text}"):
        QuantDir(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda group: group.pop("input_activations"), "input_activations=None; with int-quantized"),
        (lambda group: group["weights"].update(num_bits=4), "it has 4 bits; .* 8, in int-quantized"),
        (lambda group: group["weights"].update(strategy="tensor"), "strategy='tensor'; group and channel"),
        (lambda group: group.update(output_activations={"num_bits": 8}), "output_activations={'num_bits': 8}"),
        (lambda group: group.update(format="pack-quantized"), "float activations"),
    ],
)
def test_other_schemes_are_refused(change: Callable[[dict[str, Any]], Any], text: str, tmp_path: Path) -> None:
    folder = written_by_llm_compressor(tmp_path / "x", random_layer(16, 40, -1, True, bits=8), change)
    with pytest.raises(CheckpointError, match=text):
        QuantDir(folder)


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no scale": (lambda t: t.pop("a.up.weight_scale"), "weight_scale is missing"),
    "a scale less": (lambda t: t.update({"a.up.weight_scale": t["a.up.weight_scale"][:-1]}), "weight_scale has shape"),
    "half a group": (
        lambda t: t.update({"a.up.weight_scale": torch.ones(16, 3)}),
        "40 channels in 3 groups do not fit",
    ),
    "a vector": (lambda t: t.update({"a.up.weight_scale": torch.ones(16)}), "weight_scale"),
    "zeros too many": (
        lambda t: t.update({"a.up.weight_zero_point": torch.zeros(16, 2, dtype=torch.int8)}),
        "weight_zero_point has shape",
    ),
    "bytes without a sign": (
        lambda t: t.update({"a.up.weight": t["a.up.weight"].view(torch.uint8)}),
        "other tensors of the layer are missing or of a wrong dtype|has no tensors of it",
    ),
    "no number": (lambda t: t.update({"a.up.weight_scale": torch.full((16, 1), torch.nan)}), "NaN"),
}


@pytest.mark.parametrize("what", list(DAMAGE))
def test_damaged_layers_are_refused(what: str, tmp_path: Path) -> None:
    change, text = DAMAGE[what]
    folder = written_by_llm_compressor(tmp_path / "x", random_layer(16, 40, -1, True, bits=8), lambda group: None)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=text):
        QuantDir(folder).layer("a.up")


@pytest.mark.parametrize("said", ["pack-quantized", "int-quantized"])
def test_tensors_of_the_other_kind_than_the_config_says(said: str, tmp_path: Path) -> None:
    """Neither is taken for the other: the activations would be rounded, or not, against what the files say."""
    folder = awq_ext.save_pretrained(quantized(per_layer=DOWN), tmp_path / "x", format=NAME)

    def exchange(config: dict[str, Any]) -> None:
        four, eight = config["quantization_config"]["config_groups"].values()
        all_of_them, none = (eight, four) if said == "int-quantized" else (four, eight)
        all_of_them["targets"] += none["targets"]
        none["targets"] = []

    edit_json(folder / "config.json", exchange)
    with pytest.raises(CheckpointError, match="is missing, which the compressed-tensors-w8a8 layout needs"):
        awq_ext.from_pretrained(folder)


def test_packed_and_plain_layers_of_eight_bits_that_no_target_names() -> None:
    layer = Facts.of(random_layer(16, 40, -1, True, bits=8))
    config = LAYOUTS[NAME].quantization_config(Summary({"a.up": layer, "a.down": replace(layer, bits=4)}))
    plain = next(group for group in config["config_groups"].values() if group["format"] == "int-quantized")
    packed = plain | {"format": "pack-quantized", "input_activations": None, "targets": ["a.gate"]}
    config["config_groups"] = {"group_0": plain, "group_1": packed}
    found = LAYOUTS[NAME].reads(config)
    assert found is not None and LAYOUTS["compressed-tensors"].reads(config) is None
    assert [found.of(name).compute for name in ("a.up", "a.gate")] == ["int8", "auto"]
    with pytest.raises(CheckpointError, match="no target of config_groups fits it"):
        found.of("a.other")


def test_experts_of_one_layer_must_be_computed_alike() -> None:
    one = random_layer(16, 40, -1, True, bits=8)
    with pytest.raises(CheckpointError, match=r"different activations \(auto, int8\)"):
        join_layers([one, replace(one, compute="int8")], ["experts.0.up", "experts.1.up"])
