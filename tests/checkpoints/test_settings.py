"""What a quantization_config says of single layers, and that no entry of it is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_dirs import assert_holds, edit_json, make_directory, random_layer
from safetensors.torch import save_file

from awq_ext import CheckpointError
from awq_ext.checkpoints.formats import LAYOUTS, PackedLinear, Settings
from awq_ext.checkpoints.quantized_dir import QuantDir


def directory(
    folder: Path, format: str, layers: dict[str, PackedLinear], config: dict[str, Any], **floats: Any
) -> Path:
    tensors = dict(floats)
    for name, layer in layers.items():
        tensors |= {f"{name}.{leaf}": value for leaf, value in LAYOUTS[format].pack(layer).items()}
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def sizes(settings: Settings, *names: str) -> list[tuple[int, ...]]:
    return [settings.of(name).group_sizes for name in names]


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}


def ct(*groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    named = {f"group_{i}": group for i, group in enumerate(groups)}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": named, "ignore": []}
    return config | more


def group(size: int | None, *targets: str, bits: int = 4, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "group_size": size, "dynamic": False}
    weights["strategy"] = "group" if size else "channel"
    return {"targets": list(targets), "weights": weights, "input_activations": None, "output_activations": None} | more


# --- layers with settings of their own ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_patterns_of_dynamic_give_layers_their_own_group_sizes(format: str, tmp_path: Path) -> None:
    layers = {
        "layers.0.up": random_layer(16, 128, 64),
        "layers.0.down": random_layer(16, 128, 32),
        "layers.1.down": random_layer(16, 128, 16),
    }
    config = GPTQ | {"quant_method": format}
    config["dynamic"] = {"+:.*1\\.down": {"group_size": 16}, ".*down": {"group_size": 32, "bits": 4}, "-:.*head": {}}
    if format == "awq":
        config["version"] = "gemm"
    folder = directory(tmp_path / "x", format, layers, config, **{"head.weight": torch.ones(8, 128)})
    assert_holds(folder, layers)
    assert QuantDir(folder).floats == ["head.weight"]


def test_the_first_pattern_decides_and_matches_from_the_beginning() -> None:
    config = GPTQ | {"dynamic": {"+:a\\.b": {"group_size": 32}, "a": {"group_size": 16}, "b": {"group_size": 8}}}
    assert sizes(LAYOUTS["gptq"].reads(config), "a.b", "a.c", "x.b") == [(32,), (16,), (64,)]


@pytest.mark.parametrize(
    "dynamic, text",
    [
        ({"+:.*up": {"bits": 3}}, r"layer layers\.0\.up: it has 3 bits \(dynamic\['\+:\.\*up'\]\)"),
        ({"-:.*up": {}}, r"layer layers\.0\.up: dynamic\['-:\.\*up'\] leaves it float, but the files hold it"),
        ({"+:.*up": {"rotation": "hadamard"}}, r"dynamic\['\+:\.\*up'\]: rotation='hadamard' is not known"),
        ({"+:*up": {}}, "is no pattern"),
        ({"+:.*up": {"group_size": 0}}, "group_size=0"),
        ([1], "not pattern -> settings"),
    ],
)
def test_what_dynamic_says_and_cannot_be_run_is_named(dynamic: Any, text: str, tmp_path: Path) -> None:
    layers = {"layers.0.up": random_layer(16, 128, 64)}
    folder = directory(tmp_path / "x", "gptq", layers, GPTQ | {"dynamic": dynamic})
    with pytest.raises(CheckpointError, match=text):
        QuantDir(folder)


def test_a_model_of_eight_bits_may_have_layers_of_four(tmp_path: Path) -> None:
    layers = {"layers.0.up": random_layer(16, 128, 64)}
    config = GPTQ | {"bits": 8, "dynamic": {"+:.*up": {"bits": 4}}}
    assert_holds(directory(tmp_path / "x", "gptq", layers, config), layers)
    layers["layers.0.down"] = random_layer(16, 128, 64, bits=8)
    assert_holds(directory(tmp_path / "x", "gptq", layers, config), layers)
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.down: it has 3 bits \(bits\); of this format .* reads 4 or 8"
    ):
        QuantDir(directory(tmp_path / "x", "gptq", layers, config | {"bits": 3}))


def test_groups_of_compressed_tensors_are_told_by_name_then_pattern_then_class() -> None:
    config = ct(group(128, "Linear"), group(64, "re:.*mlp.*"), group(32, "m.0.mlp.down"), group(None, "re:.*attn"))
    found = LAYOUTS["compressed-tensors"].reads(config)
    assert sizes(found, "m.0.mlp.down", "m.0.mlp.up", "m.0.attn", "m.0.other") == [(32,), (64,), (-1,), (128,)]


def test_one_row_of_groups_fits_several_sizes_that_only_names_tell_apart(tmp_path: Path) -> None:
    """64 channels are one group of 64 or of -1, and two groups of 32: the config says which."""
    layers = {"a.up": random_layer(16, 64, 32, True), "a.down": random_layer(16, 64, -1, True)}
    config = ct(group(32, "re:.*up$"), group(None, "re:.*down$"))
    folder = directory(tmp_path / "x", "compressed-tensors", layers, config)
    assert_holds(folder, layers)
    assert {name: QuantDir(folder).layer(name).group_size for name in layers} == {"a.up": 32, "a.down": -1}


def test_a_group_that_cannot_be_read_is_named_with_the_layer_in_it(tmp_path: Path) -> None:
    layers = {"a.up": random_layer(16, 64, 32, True), "a.down": random_layer(16, 64, 32, True)}
    config = ct(group(32, "Linear"), group(32, "re:.*down$", bits=3))
    with pytest.raises(CheckpointError, match=r"layer a\.down: config_groups\['group_1'\]: it has 3 bits"):
        QuantDir(directory(tmp_path / "x", "compressed-tensors", layers, config))
    eight = {"a.down.weight": torch.zeros(16, 64, dtype=torch.int8), "a.down.weight_scale": torch.ones(16, 1)}
    config["config_groups"]["group_1"]["format"] = "int-quantized"
    with pytest.raises(
        CheckpointError, match=r"layer a\.down: config_groups\['group_1'\]: it has 3 bits; .* 8, in int-q"
    ):
        QuantDir(directory(tmp_path / "x", "compressed-tensors", {"a.up": layers["a.up"]}, config, **eight))


@pytest.mark.parametrize("ignore", [["a.up"], ["re:.*up"]])
def test_a_quantized_layer_that_the_config_leaves_float(ignore: list[str], tmp_path: Path) -> None:
    layers = {"a.up": random_layer(16, 64, 32, True)}
    folder = directory(tmp_path / "x", "compressed-tensors", layers, ct(group(32, "Linear"), ignore=ignore))
    with pytest.raises(CheckpointError, match=r"layer a\.up: the config leaves it float \(ignore:"):
        QuantDir(folder)


# --- entries that may change the computation ------------------------------------------------------------------------------


def hadamard(*locations: str) -> dict[str, Any]:
    apply = [{"targets": ["Linear"], "location": place, "inverse": False, "ignore": []} for place in locations]
    return {"config_groups": {"R4": {"type": "hadamard", "apply": apply, "randomize": False}}}


def test_transforms_of_weights_are_in_the_weights() -> None:
    config = ct(group(32, "Linear"), transform_config=hadamard("weight_input", "weight_output"))
    assert LAYOUTS["compressed-tensors"].reads(config).group_sizes == (32,)


UNKNOWN: dict[str, tuple[str, dict[str, Any], str]] = {
    "transform of inputs": ("compressed-tensors", {"transform_config": hadamard("input")}, "'R4' applies a hadamard"),
    "transform of keys": (
        "compressed-tensors",
        {"transform_config": hadamard("weight_input", "k_cache")},
        "location='k_cache' while the model runs",
    ),
    "transform of another version": ("compressed-tensors", {"transform_config": {"R": 1}}, "transform_config={'R': 1}"),
    "keys and values rounded": ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme={'num"),
    "sparse": ("compressed-tensors", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config={'format'"),
    "GPTQ rotated": ("gptq", {"rotation": "hadamard"}, "rotation='hadamard'"),
    "GPTQ with rounded inputs": ("gptq", {"act_bits": 8}, "act_bits=8"),
    "GPTQ with an adapter": ("gptq", {"adapter": {"rank": 8}}, "adapter={'rank': 8}"),
    "GPTQ of floats": ("gptq", {"data_type": "nv_fp"}, "data_type='nv_fp'"),
    "AWQ, nobody knows": ("awq", {"input_rotation": True}, "input_rotation=True"),
    "ModelOpt cache": ("modelopt", {"kv_cache_quant_algo": "FP8"}, "kv_cache_quant_algo='FP8'"),
    "native": ("native", {"rotated": [1]}, r"rotated=\[1\]"),
}


@pytest.mark.parametrize("what", list(UNKNOWN))
def test_an_entry_that_is_not_known_is_refused_with_its_value(what: str, tmp_path: Path) -> None:
    format, more, text = UNKNOWN[what]
    make_directory(tmp_path, format)
    QuantDir(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config["quantization_config"].update(more))
    with pytest.raises(CheckpointError, match=text):
        QuantDir(tmp_path)


@pytest.mark.parametrize("format", list(LAYOUTS))
def test_an_unknown_entry_that_is_off_is_passed_over(format: str, tmp_path: Path) -> None:
    layers = make_directory(tmp_path, format)
    edit_json(tmp_path / "config.json", lambda config: config["quantization_config"].update(new=None, more={}, most=[]))
    assert_holds(tmp_path, layers)


def test_a_group_that_rounds_activations_of_modules_without_quantized_weights() -> None:
    attention = {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8}}
    with pytest.raises(CheckpointError, match=r"'group_1'\] rounds activations of \['LlamaAttention'\]"):
        LAYOUTS["compressed-tensors"].reads(ct(group(32, "Linear"), attention))


TOOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "AutoGPTQ": (
        "gptq",
        GPTQ
        | {
            "damp_percent": 0.01,
            "static_groups": False,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "is_marlin_format": False,
        },
    ),
    "GPTQModel": (
        "gptq",
        GPTQ
        | {
            "checkpoint_format": "gptq",
            "format": "gptq",
            "method": "gptq",
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["gptqmodel:2.2.0"], "damp_percent": 0.05},
        },
    ),
    "Optimum": (
        "gptq",
        GPTQ
        | {
            "tokenizer": None,
            "dataset": "c4",
            "backend": "auto",
            "use_exllama": False,
            "exllama_config": {"version": 1},
            "max_input_length": None,
            "batch_size": 1,
            "cache_block_outputs": True,
            "modules_in_block_to_quantize": [["q_proj"]],
        },
    ),
    "AutoRound": (
        "gptq",
        GPTQ
        | {
            "data_type": "int",
            "iters": 200,
            "autoround_version": "0.5.1",
            "provider": "auto-round",
            "enable_quanted_input": True,
            "act_bits": 16,
            "supported_types": ["Linear"],
        },
    ),
    "Transformers 4": (
        "awq",
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 64,
            "zero_point": True,
            "version": "gemm",
            "backend": "autoawq",
            "do_fuse": False,
            "exllama_config": None,
            "fuse_max_seq_len": None,
            "modules_to_fuse": None,
            "modules_to_not_convert": ["visual"],
        },
    ),
    "llm-compressor": (
        "compressed-tensors",
        ct(
            group(64, "Linear", format="pack-quantized"),
            quantization_status="compressed",
            global_compression_ratio=None,
            kv_cache_scheme=None,
            sparsity_config={},
            transform_config={},
            version="0.12.2",
        ),
    ),
}


@pytest.mark.parametrize("tool", list(TOOLS))
def test_what_tools_note_of_how_they_quantized_is_no_hindrance(tool: str) -> None:
    format, config = TOOLS[tool]
    assert LAYOUTS[format].reads(config).of("layers.0.up").group_sizes == (64,)


def test_the_version_of_gptq_under_its_newer_name() -> None:
    assert LAYOUTS["gptq"].reads(GPTQ | {"format": "gptq_v2"}).zero_offset == 0
    assert LAYOUTS["gptq"].reads(GPTQ | {"format": "gptq"}).zero_offset == 1
