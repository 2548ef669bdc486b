"""Each layout bit for bit: against index arithmetic on single elements written down here, and there and back for odd shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from decoding import FORMATS, decode
from quantized_dirs import random_layer

from awq_ext import QuantLinear
from awq_ext.checkpoints.formats import LAYOUTS, CheckpointError, Facts, PackedLinear, Settings, Summary, layout
from awq_ext.kernels import reference

N, K, G = 16, 128, 32


def settings_of(name: str, layer: PackedLinear) -> Settings:
    """What a reader finds in the config that this layout writes, having gone through JSON."""
    config = LAYOUTS[name].quantization_config(Summary({"layer": Facts.of(layer)}, ["lm_head"]))
    settings = LAYOUTS[name].reads(json.loads(json.dumps(config)))
    assert settings is not None
    return settings.of("layer")


def assert_same(a: PackedLinear, b: PackedLinear) -> None:
    assert (a.in_features, a.out_features, a.groups) == (b.in_features, b.out_features, b.groups)
    assert torch.equal(a.qweight, b.qweight)
    assert torch.equal(a.scales.double(), b.scales.double())
    assert torch.equal(a.zeros, b.zeros)
    for x, y in ((a.bias, b.bias), (a.pre_quant_scale, b.pre_quant_scale)):
        assert (x is None) == (y is None)
        assert x is None or (x.dtype == y.dtype and torch.equal(x, y))


def test_all_layouts_have_a_decoder_here() -> None:
    assert list(FORMATS) == list(LAYOUTS)


@pytest.mark.parametrize(("name", "bits"), [(name, bits) for name in FORMATS for bits in LAYOUTS[name].widths])
def test_every_element_is_where_the_format_says(name: str, bits: int) -> None:
    whole = bits == 8 and name == "compressed-tensors-w8a8"
    layer = random_layer(g=-1 if whole else G, symmetric=name == "modelopt" or bits == 8, bits=bits)
    assert LAYOUTS[name].problems("layer", layer) == []
    found = decode(name, LAYOUTS[name].pack(layer), (N, K, layer.groups), bits)
    assert torch.equal(found.codes, layer.codes().long())
    assert torch.equal(found.zeros, layer.zeros.long())
    assert torch.equal(found.scales, layer.scales.double())


SHAPES = {
    "awq": [(16, 128, 32), (8, 24, 8), (40, 96, -1), (24, 36, 12), (8, 33, -1)],
    "gemv": [(16, 128, 32), (24, 192, 64), (8, 256, 128), (8, 512, 256), (16, 136, -1), (8, 1024, 32)],
    "gemv_fast": [(16, 128, 32), (24, 192, 64), (8, 256, 128), (16, 192, -1), (8, 1024, 32)],
    "llm-awq": [(16, 128, 32), (24, 192, 64), (8, 256, 128), (16, 192, -1), (8, 1024, 32)],
    "compressed-tensors": [(16, 128, 32), (5, 12, 4), (13, 33, -1), (1, 7, 7), (9, 35, 5)],
    "gptq": [(16, 128, 32), (8, 24, 8), (40, 96, -1), (24, 72, 12), (8, 40, 32)],
    "modelopt": [(16, 128, 32), (2, 6, 3), (6, 33, -1), (10, 35, 5)],
    "gguf": [(16, 128, 32), (5, 32, 32), (3, 96, 32), (1, 32, -1)],
    "mlx": [(16, 128, 32), (5, 32, 32), (3, 192, 64), (8, 256, 128), (2, 128, -1)],
    "native": [(16, 128, 32), (5, 12, 4), (13, 33, 16), (1, 7, -1), (9, 35, 64)],
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name, shapes in SHAPES.items() for shape in shapes])
def test_there_and_back(name: str, shape: tuple[int, int, int], symmetric: bool, bias: bool) -> None:
    layer = random_layer(*shape, symmetric=symmetric or name == "modelopt", bias=bias)
    assert LAYOUTS[name].problems("layer", layer) == []
    tensors = LAYOUTS[name].pack(layer)
    assert set(LAYOUTS[name].suffixes) <= set(tensors) <= {*LAYOUTS[name].suffixes, *LAYOUTS[name].optional}
    assert LAYOUTS[name].claims({leaf: tensor.dtype for leaf, tensor in tensors.items()})
    back = LAYOUTS[name].unpack(tensors, settings_of(name, layer))
    assert_same(layer, back)
    if name == "native":
        assert back.group_size == layer.group_size


@pytest.mark.parametrize("name", [name for name in LAYOUTS if torch.bfloat16 in LAYOUTS[name].scale_dtypes])
def test_layouts_that_know_bfloat16_keep_it(name: str) -> None:
    layer = random_layer(symmetric=name == "modelopt", dtype=torch.bfloat16)
    assert LAYOUTS[name].problems("layer", layer) == []
    assert_same(layer, LAYOUTS[name].unpack(LAYOUTS[name].pack(layer), settings_of(name, layer)))


@pytest.mark.parametrize("name", ["modelopt", "native"])
def test_run_time_scales_are_kept_where_there_is_a_slot(name: str) -> None:
    layer = random_layer(symmetric=True, scaled=True)
    assert LAYOUTS[name].problems("mlp.down_proj", layer) == []
    assert_same(layer, LAYOUTS[name].unpack(LAYOUTS[name].pack(layer), settings_of(name, layer)))


def test_modelopt_writes_ones_where_nothing_is_scaled() -> None:
    tensors = LAYOUTS["modelopt"].pack(random_layer(symmetric=True))
    assert torch.equal(tensors["pre_quant_scale"], torch.ones(K)), (
        "TensorRT-LLM asks for one in every layer it does not join"
    )


def test_gptq_zeros_of_both_versions() -> None:
    layer = random_layer()
    tensors = LAYOUTS["gptq"].pack(layer)
    words = [
        [sum(int(layer.zeros[8 * w + i, g]) << 4 * i for i in range(8)) for w in range(N // 8)] for g in range(K // G)
    ]
    tensors["qzeros"] = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    second = LAYOUTS["gptq"].reads({"quant_method": "gptq", "bits": 4, "group_size": G, "checkpoint_format": "gptq_v2"})
    assert second is not None
    assert_same(layer, LAYOUTS["gptq"].unpack(tensors, second))
    # a stored 15 is the -1 of a zero of 0
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], -1)
    assert not LAYOUTS["gptq"].unpack(tensors, settings_of("gptq", layer)).zeros.any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("writer", ["gptqmodel:7.6.0", ["optimum:1.27", "gptqmodel:2.2.0"]], ids=str)
def test_gptq_zeros_of_gptqmodel(writer: Any, bits: int) -> None:
    """It subtracts 1 from all zeros of a word at once, so that one of 0 borrows from the next. No zero is lost."""
    layer, per_word = random_layer(bits=bits), 32 // bits
    for n, g in ((3, 1), (4, 1), (0, 2), (15, 2)):
        layer.zeros[n, g] = 0
    words = [
        [
            sum(int(layer.zeros[per_word * w + i, g]) - 1 << bits * i for i in range(per_word))
            for w in range(N // per_word)
        ]
        for g in range(K // G)
    ]
    tensors = LAYOUTS["gptq"].pack(layer) | {"qzeros": torch.tensor(words).to(torch.int32)}
    config = {"quant_method": "gptq", "bits": bits, "group_size": G}
    theirs, others = (
        LAYOUTS["gptq"].reads(config | more) for more in ({"meta": {"quantizer": writer}}, {"meta": None})
    )
    assert theirs is not None and others is not None
    assert_same(layer, LAYOUTS["gptq"].unpack(tensors, theirs))
    assert not torch.equal(layer.zeros, LAYOUTS["gptq"].unpack(tensors, others).zeros)


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_reordered_channels_are_refused_and_trivial_ones_not(name: str) -> None:
    leaf = {"gptq": "g_idx", "compressed-tensors": "weight_g_idx"}[name]
    layer = random_layer()
    tensors = LAYOUTS[name].pack(layer) | {leaf: torch.arange(K, dtype=torch.int32) // G}
    assert_same(layer, LAYOUTS[name].unpack(tensors, settings_of(name, layer)))
    tensors[leaf] = tensors[leaf].flip(0)
    with pytest.raises(CheckpointError, match="reorders the channels"):
        LAYOUTS[name].unpack(tensors, settings_of(name, layer))


def test_dequantized_weight_is_the_layer_s() -> None:
    layer = random_layer()
    linear = torch.nn.Linear(K, N, bias=False, device="meta")
    ours = QuantLinear.from_packed(linear, layer)
    assert torch.equal(layer.dequantize(), ours.weight)
    expected = reference.dequantize_weight(layer.codes(), layer.scales, layer.zeros, G)
    assert torch.equal(layer.dequantize(), expected)


def test_group_size_of_llm_awq_files_without_a_config() -> None:
    for k, g in ((1024, 64), (1024, 32), (256, 128)):
        layer = random_layer(k=k, g=g)
        back = LAYOUTS["llm-awq"].unpack(LAYOUTS["llm-awq"].pack(layer), Settings(()))
        assert back.group_size == g
        assert_same(layer, back)


# --- what a layout cannot hold --------------------------------------------------------------------------------------------

PROBLEMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "run-time scale": ("awq", {"scaled": True}, 'fold="always"'),
    "run-time scale, ct": ("compressed-tensors", {"scaled": True}, 'fold="always"'),
    "joined run-time scale": ("modelopt", {"scaled": True, "symmetric": True}, "TensorRT-LLM does not read"),
    "zero points": ("modelopt", {}, "symmetric=True"),
    "short group": ("awq", {"k": 40, "g": 32}, "in_features=40 is not a multiple of group_size=32"),
    "short group, ct": ("compressed-tensors", {"k": 96, "g": 64}, "quantize with group_size=32, or"),
    "no group of the usual sizes": ("awq", {"k": 40, "g": 32}, "quantize with group_size=-1, or"),
    "outputs": ("awq", {"n": 12}, "out_features=12 is not a multiple of 8"),
    "inputs": ("gptq", {"k": 36, "g": 12}, "in_features=36 is not a multiple of 8"),
    "gemv groups": ("gemv", {"g": 16}, "group_size=16 is not one of"),
    "gguf groups": ("gguf", {"g": 16}, "group_size=16 is not a multiple of 32: quantize with group_size=32"),
    "gguf, 8 bits with zeros": ("gguf", {"bits": 8}, "there is no block: add"),
    "mlx groups": ("mlx", {"g": 16}, "quantize with group_size=32, 64 or 128"),
    "mlx, 8 bits with zeros in bfloat16": ("mlx", {"bits": 8, "dtype": torch.bfloat16}, 'or scale_dtype="float16"'),
    "gemv_fast inputs": ("gemv_fast", {"k": 96}, "in_features=96 is not a multiple of 64"),
}


def test_no_group_size_is_advised_where_the_layout_cannot_hold_the_width() -> None:
    """Groups of 16 divide 48, but the blocks of a GGUF file do not."""
    (problem,) = LAYOUTS["gguf"].problems("down_proj", random_layer(k=48, g=32))
    assert problem == "in_features=48 is not a multiple of 32: leave the layer float with skip="


@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if 8 not in LAYOUTS[name].widths])
def test_eight_bits_are_for_layouts_that_have_them(name: str, group_size: int) -> None:
    """Of symmetric layers with one scale a row one more layout is named."""
    layer = random_layer(k=256, g=group_size, symmetric=True, bits=8)
    (problem,) = LAYOUTS[name].problems("self_attn.q_proj", layer)
    start, named, end = problem.partition('"gptq", "mlx", "native" or "gguf" (that ')
    assert named and start.startswith('it has 8 bits, not 4: use format="compressed-tensors", ')
    assert end == 'only if it is symmetric), or quantize with bits=4 (an output layer: with head="int4")'
    holding = {other for other, layout in LAYOUTS.items() if not layout.problems("self_attn.q_proj", layer)}
    assert holding == {other for other in LAYOUTS if f'"{other}"' in problem}
    assert ("compressed-tensors-w8a8" in holding) == (group_size == -1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_eight_bits_there_and_back(symmetric: bool) -> None:
    """Rows of codes are bytes, and the config names the bits of layers that have others than most."""
    native = LAYOUTS["native"]
    wide, narrow = random_layer(9, 37, 16, symmetric, bits=8, scaled=True), random_layer(9, 37, 16, symmetric)
    assert native.problems("wide", wide) == []
    tensors = native.pack(wide)
    assert torch.equal(tensors["qweight"], wide.codes()) and wide.symmetric == symmetric
    for layers, bits, entry in (
        ({"wide": wide}, 8, [37, 16]),
        ({"wide": wide, "narrow": narrow}, 4, [37, 16, 8]),
        ({"narrow": narrow}, 4, None),
    ):
        config = native.quantization_config(Summary({name: Facts.of(layer) for name, layer in layers.items()}))
        assert (config["bits"], config["layers"].get("wide")) == (bits, entry)
        settings = native.reads(config)
        for name, layer in layers.items():
            back = native.unpack(native.pack(layer), settings.of(name))
            assert_same(layer, back)
            assert (back.bits, back.symmetric) == (layer.bits, symmetric)
    with pytest.raises(CheckpointError, match="qweight has shape"):
        native.unpack(native.pack(narrow), native.reads(config | {"bits": 8}).of("narrow"))
    with pytest.raises(CheckpointError, match="5 bits; awq_ext runs 4 or 8"):
        native.reads(config | {"layers": {"narrow": [37, 16, 5]}})


@pytest.mark.parametrize("name", [name for name in LAYOUTS if 8 in LAYOUTS[name].widths])
def test_eight_bits_in_one_group_a_row(name: str) -> None:
    """Whose zeros are one column, in memory also a row."""
    layer = random_layer(k=64, g=64, symmetric=name in ("gguf", "compressed-tensors-w8a8"), bits=8)
    back = LAYOUTS[name].unpack(LAYOUTS[name].pack(layer), settings_of(name, layer))
    assert torch.equal(back.dequantize(), layer.dequantize())


@pytest.mark.parametrize("symmetric", [False, True])
def test_eight_bits_of_other_tools(symmetric: bool) -> None:
    """Four codes a word, by the formulas of the readers; ``dynamic`` and ``config_groups`` tell them from layers of 4 bits."""
    wide, narrow = random_layer(symmetric=symmetric, bits=8), random_layer(symmetric=symmetric)
    gptq, ct = LAYOUTS["gptq"].pack(wide), LAYOUTS["compressed-tensors"].pack(wide)
    assert ("weight_zero_point" in ct) != symmetric
    for name, tensors in (("gptq", gptq), ("compressed-tensors", ct)):
        found = decode(name, tensors, (N, K, K // G), 8)
        assert torch.equal(found.codes, wide.codes().long()) and torch.equal(found.zeros, wide.zeros.long()), name
    layers = {"a.0.up": wide, "a.0.down": narrow, "a.1.up": wide, "a.1.down": narrow}
    for name in ("gptq", "compressed-tensors"):
        for some in (layers, {"a.0.up": wide}):
            config = LAYOUTS[name].quantization_config(Summary({key: Facts.of(layer) for key, layer in some.items()}))
            settings = LAYOUTS[name].reads(json.loads(json.dumps(config)))
            for key, layer in some.items():
                assert LAYOUTS[name].problems(key, layer) == []
                assert settings.bits(key) == layer.bits
                assert_same(layer, LAYOUTS[name].unpack(LAYOUTS[name].pack(layer), settings.of(key)))
        for n, k, g in ((9, 35, 5), (13, 33, -1)) if name == "compressed-tensors" else ((8, 40, 32),):
            odd = random_layer(n, k, g, symmetric, bits=8)
            assert_same(odd, LAYOUTS[name].unpack(LAYOUTS[name].pack(odd), settings_of(name, odd)))


def test_patterns_of_gptq_layers_of_other_bits() -> None:
    """With any number where all layers of that name are meant, and under the names that vLLM joins layers to."""
    wide, narrow = Facts.of(random_layer(bits=8)), Facts.of(random_layer())

    def dynamic(**bits: Facts) -> dict[str, Any]:
        names = {key.replace("__", "."): facts for key, facts in bits.items()}
        return LAYOUTS["gptq"].quantization_config(Summary(names)).get("dynamic", {})

    eight = {"bits": 8}
    assert dynamic(a__0__up=wide, a__1__up=wide, a__1__down=narrow) == {r"+:a\.\d+\.up$": eight}
    assert dynamic(a__0__up=wide, a__1__up=narrow) == {r"+:a\.0\.up$": eight}
    assert dynamic(a__0__up=wide) == {}
    joined = dynamic(a__0__q_proj=wide, a__0__k_proj=wide, a__0__v_proj=wide, a__0__down=narrow)
    assert joined == {rf"+:a\.\d+\.{leaf}$": eight for leaf in ("k_proj", "q_proj", "qkv_proj", "v_proj")}


@pytest.mark.parametrize("what", list(PROBLEMS))
def test_problems_name_the_choice_that_fixes_them(what: str) -> None:
    name, options, text = PROBLEMS[what]
    (problem,) = LAYOUTS[name].problems("self_attn.q_proj", random_layer(**options))
    assert text in problem


def test_gptq_cannot_hold_a_zero_of_zero() -> None:
    layer = random_layer()
    layer.zeros[3, 1] = 0
    (problem,) = LAYOUTS["gptq"].problems("layer", layer)
    assert "zero of 0" in problem


@pytest.mark.parametrize("scale", [2.0**-24 * 1.5, 2.0**17])
def test_bfloat16_scales_that_float16_cannot_hold(scale: float) -> None:
    layer = random_layer(dtype=torch.bfloat16)
    layer.scales[2, 3] = scale
    for name in ("awq", "gemv", "gemv_fast", "gptq"):
        (problem,) = LAYOUTS[name].problems("layer", layer)
        assert 'scale_dtype="float16"' in problem


def test_bfloat16_scales_that_are_exact_in_float16_are_converted() -> None:
    layer = random_layer(dtype=torch.bfloat16)
    layer.scales.copy_(torch.tensor(2.0**-7))
    assert LAYOUTS["awq"].problems("layer", layer) == []
    tensors = LAYOUTS["awq"].pack(layer)
    assert tensors["scales"].dtype == torch.float16
    assert_same(layer, LAYOUTS["awq"].unpack(tensors, settings_of("awq", layer)))


@pytest.mark.parametrize("scale", [65504.0, 2.0**-24, 3 * 2.0**-24, 2.0**-14])
def test_products_of_zeros_at_the_ends_of_float16(scale: float) -> None:
    layer = random_layer()
    layer.scales.fill_(scale)
    problems = LAYOUTS["gemv_fast"].problems("layer", layer)
    if scale == 65504.0:
        assert len(problems) == 1
        assert "leaves the range of 16 bits" in problems[0]
    else:
        assert problems == []
        assert_same(
            layer, LAYOUTS["gemv_fast"].unpack(LAYOUTS["gemv_fast"].pack(layer), settings_of("gemv_fast", layer))
        )


# --- damaged tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_damaged_tensors_are_refused(name: str) -> None:
    layer = random_layer(symmetric=name == "modelopt", bias=True)
    settings, tensors = settings_of(name, layer), LAYOUTS[name].pack(layer)
    needed = [leaf for leaf in tensors if leaf in LAYOUTS[name].suffixes]
    assert needed
    for leaf, tensor in ((leaf, tensor) for leaf, tensor in tensors.items() if tensor.numel()):
        wrong = {
            "one dimension more": tensor[None],
            "a row less": tensor[:-1],
            "a row more": torch.cat((tensor, tensor[-1:])),
            "no rows": tensor[:0],
            "another dtype": tensor.to(torch.complex64),
            "float64": tensor.double(),
            "a scalar": tensor.reshape(-1)[0],
        }
        if tensor.dim() == 2:
            wrong |= {"one dimension": tensor.reshape(-1)}
            wrong |= {"a column less": tensor[:, :-1], "a column more": torch.cat((tensor, tensor[:, -1:]), 1)}
        for what, value in wrong.items():
            with pytest.raises(CheckpointError):
                LAYOUTS[name].unpack(tensors | {leaf: value}, settings)
                pytest.fail(f"{leaf} with {what} went through")
        if leaf in needed:
            with pytest.raises(CheckpointError, match="missing"):
                LAYOUTS[name].unpack({other: t for other, t in tensors.items() if other != leaf}, settings)


def test_values_out_of_range() -> None:
    layer = random_layer()
    tensors = LAYOUTS["native"].pack(layer)
    with pytest.raises(CheckpointError, match="below 16, got 17"):
        LAYOUTS["native"].unpack(tensors | {"zeros": torch.full_like(layer.zeros, 17)}, settings_of("native", layer))
    for products in (0.5, 1.0, float("nan"), float("inf"), -16.0):
        tensors = LAYOUTS["gemv_fast"].pack(layer)
        tensors["qzeros"][1, 3] = products * tensors["scales"][1, 3]
        with pytest.raises(CheckpointError, match="whole numbers from 0 to"):
            LAYOUTS["gemv_fast"].unpack(tensors, settings_of("gemv_fast", layer))
    tensors = LAYOUTS["compressed-tensors"].pack(layer)
    for shape in ([N, -K], [0, 0], [2**40, K], [N, 2**40], [N, K + 8]):
        with pytest.raises(CheckpointError):
            LAYOUTS["compressed-tensors"].unpack(
                tensors | {"weight_shape": torch.tensor(shape)}, settings_of("compressed-tensors", layer)
            )


# --- configs --------------------------------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[dict[str, Any], str, tuple[int, ...]]] = {
    "AutoAWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
        "awq",
        (64,),
    ),
    "AutoAWQ, capitals": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMM"}, "awq", (128,)),
    "AutoAWQ, old file": ({"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMV"}, "gemv", (128,)),
    "transformers 5": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "format": "gemv_fast"},
        "gemv_fast",
        (128,),
    ),
    "no version": ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq", (128,)),
    "AutoGPTQ file": ({"bits": 4, "group_size": 128, "desc_act": False, "sym": True}, "gptq", (128,)),
    "ModelOpt file": (
        {
            "producer": {},
            "quantization": {"quant_algo": "W4A16_AWQ", "group_size": 128, "exclude_modules": ["lm_head"]},
        },
        "modelopt",
        (128,),
    ),
    "mlx-lm": ({"group_size": 64, "bits": 4, "mode": "affine", "lm_head": False}, "mlx", (64,)),
    "mlx-lm, old": ({"group_size": 64, "bits": 8}, "mlx", (64,)),
    "two groups": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "a": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}},
                "b": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}},
            },
        },
        "compressed-tensors",
        (32, -1),
    ),
}


@pytest.mark.parametrize("what", list(CONFIGS))
def test_configs_of_the_wild(what: str) -> None:
    config, name, sizes = CONFIGS[what]
    found = {key: settings for key, each in LAYOUTS.items() if (settings := each.reads(config)) is not None}
    # the first one counts; layers of 8 bits are W8A8 in a layout of their own, which holds all that the other does
    assert list(found) == ([name, "compressed-tensors-w8a8"] if name == "compressed-tensors" else [name])
    assert found[name].group_sizes == sizes


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "8 bits": ("awq", {"quant_method": "awq", "bits": 8}, "8 bits"),
    "bits as text": ("awq", {"quant_method": "awq", "bits": "4"}, "not a whole number"),
    "group size": ("awq", {"quant_method": "awq", "bits": 4, "group_size": 0}, "group_size=0"),
    "gptq marlin": ("gptq", {"quant_method": "gptq", "checkpoint_format": "marlin"}, "marlin"),
    "fp8": ("modelopt", {"quant_method": "modelopt", "quant_algo": "FP8"}, "FP8"),
    "ct float": (
        "compressed-tensors",
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"a": {"weights": {}}}},
        "float-quantized",
    ),
    "ct activations": (
        "compressed-tensors",
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}},
        },
        "float activations",
    ),
    "ct blocks": (
        "compressed-tensors",
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": {"weights": {"num_bits": 4, "strategy": "block"}}},
        },
        "strategy='block'",
    ),
    "ct without groups": ("compressed-tensors", {"quant_method": "compressed-tensors"}, "config_groups"),
    "mlx mode": ("mlx", {"group_size": 32, "bits": 4, "mode": "mxfp4"}, "mode='mxfp4'"),
    "mlx mode of a layer": (
        "mlx",
        {"group_size": 32, "bits": 4, "a.b": {"mode": "nvfp4"}},
        "quantization: a.b: mode='nvfp4'",
    ),
    "mlx activations": ("mlx", {"group_size": 32, "bits": 4, "rotated": "yes"}, "rotated='yes' is not known"),
    "native layers": ("native", {"quant_method": "awq_ext", "version": 1, "layers": {"a": [1]}}, "layers must be"),
    "native version": ("native", {"quant_method": "awq_ext", "version": 2, "layers": {}}, "version 2"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_configs_that_cannot_be_read_say_why(what: str) -> None:
    name, config, text = REFUSED[what]
    with pytest.raises(CheckpointError, match=text):
        LAYOUTS[name].reads(config)


def test_group_size_that_fits() -> None:
    settings = Settings((64, -1))
    assert settings.group_size(256, 4) == 64
    assert settings.group_size(256, 1) == -1
    for k, groups in ((256, 2), (256, 0), (256, 5)):
        with pytest.raises(CheckpointError, match="do not fit"):
            settings.group_size(k, groups)


def test_group_sizes_a_model_must_agree_on() -> None:
    def summary(*shapes: tuple[int, int]) -> Summary:
        return Summary({f"layer{i}": Facts.of(random_layer(k=k, g=g)) for i, (k, g) in enumerate(shapes)})

    assert summary((128, 32), (32, 32)).group_sizes() == [32]
    assert summary((128, -1), (64, -1)).group_sizes() == [-1]
    assert summary((128, 128), (64, 64)).group_sizes() == [-1]
    assert summary((128, 128)).group_sizes() == [128]
    assert LAYOUTS["awq"].model_problems(summary((128, 32), (32, 32))) == []
    for shapes in (((128, 32), (128, 64)), ((128, 32), (64, -1)), ((128, -1), (128, 32))):
        assert len(LAYOUTS["awq"].model_problems(summary(*shapes))) == 1
        assert LAYOUTS["compressed-tensors"].model_problems(summary(*shapes)) == []


def test_a_float_layer_whose_name_is_part_of_another_s() -> None:
    facts = Facts.of(random_layer())
    summary = Summary({"layers.0.mlp.gate_proj": facts}, ["layers.0.mlp.gate", "lm_head"])
    (problem,) = LAYOUTS["awq"].model_problems(summary)
    assert "layers.0.mlp.gate " in problem
    assert LAYOUTS["compressed-tensors"].model_problems(summary) == []


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match="'awq', 'gemv'"):
        layout("marlin")
