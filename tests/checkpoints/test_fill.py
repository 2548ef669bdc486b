"""place(): layers and tensors of a source go into a model, all of them or none; on sources without files."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from checks import Snapshot, same_bits
from quantized_dirs import MemorySource, random_layer
from torch import Tensor, nn

from awq_ext import CheckpointError, QuantLinear
from awq_ext.checkpoints.fill import place
from awq_ext.checkpoints.formats import InMemory, PackedLinear

N, K, G = 6, 32, 16


class Model(nn.Module):
    """Two Linears that can be int4, a float one, a norm, and buffers of both kinds."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(K, N, bias), nn.Linear(K, N, bias)
        self.head, self.norm = nn.Linear(K, 3, bias=False), nn.LayerNorm(K, bias=False)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("table", torch.ones(4), persistent=False)


def floats(**others: Tensor) -> dict[str, Tensor]:
    found = {"head.weight": torch.randn(3, K), "norm.weight": torch.randn(K), "steps": torch.arange(2)}
    return found | {name.replace("__", "."): tensor for name, tensor in others.items()}


def layers(**options: Any) -> dict[str, PackedLinear]:
    return {name: random_layer(N, K, G, **{"bias": True} | options) for name in ("a", "b")}


def whole(tied: dict[str, str] | None = None, **run_time: tuple[torch.dtype, str]) -> InMemory:
    return InMemory(tied or {}, {name: (torch.float32, "auto") for name in ("a", "b")} | run_time)


def assert_layer(module: nn.Module, packed: PackedLinear) -> None:
    assert isinstance(module, QuantLinear)
    for leaf in ("qweight", "scales", "zeros"):
        assert same_bits(getattr(module, leaf), getattr(packed, leaf)), leaf


@pytest.mark.parametrize("meta", [False, True])
def test_everything_lands_in_its_place(meta: bool) -> None:
    source = MemorySource(layers(scaled=True), floats(), None)
    with torch.device("meta" if meta else "cpu"):
        model = Model()
    model.register_buffer("table", torch.ones(4), persistent=False)  # which no file has
    assert place(model, source) is model
    for name in ("a", "b"):
        layer = model.get_submodule(name)
        assert_layer(layer, source.layers[name])
        assert same_bits(layer.pre_quant_scale, source.layers[name].pre_quant_scale)
        assert same_bits(layer.bias.float(), source.layers[name].bias.float())
    assert same_bits(model.head.weight, source.tensors["head.weight"])
    assert same_bits(model.norm.weight, source.tensors["norm.weight"])
    assert same_bits(model.steps, source.tensors["steps"])
    assert isinstance(model.head.weight, nn.Parameter)


def test_flags_and_hooks_stay() -> None:
    model, seen = Model(), []
    model.a.register_forward_hook(lambda *_: seen.append("a"))
    model.a.eval()
    model.a.bias.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    place(model, MemorySource(layers(), floats()))
    assert (model.a.training, model.b.training) == (False, True)
    assert (model.a.bias.requires_grad, model.b.bias.requires_grad) == (False, True)
    assert (model.norm.weight.requires_grad, model.head.weight.requires_grad) == (False, True)
    model.a(torch.randn(1, K))
    assert seen == ["a"]


def test_a_quantized_model_is_filled_again() -> None:
    source = MemorySource(layers(), floats())
    model = place(Model(), MemorySource(layers(), floats()))
    place(model, source)
    assert_layer(model.a, source.layers["a"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_casts_parameters_alone(dtype: torch.dtype) -> None:
    model = place(Model(), MemorySource(layers(), floats(table=torch.randn(4))), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert (model.a.dtype, model.a.weight.dtype) == (dtype, dtype)
    assert (model.a.tile_scales.dtype, model.table.dtype, model.steps.dtype) == (
        torch.float16,
        torch.float32,
        torch.int64,
    )


# --- tensors with several names -----------------------------------------------------------------------------------------


def tied_model() -> Model:
    model = Model()
    model.other = nn.Linear(K, 3, bias=False)
    model.other.weight = model.head.weight
    return model


def test_what_the_model_shares_comes_once() -> None:
    model = place(tied_model(), MemorySource(layers(), floats()))
    assert model.other.weight is model.head.weight


def test_a_whole_model_says_itself_what_is_shared() -> None:
    apart = floats(other__weight=torch.randn(3, K), table=torch.randn(4))
    model = place(tied_model(), MemorySource(layers(), apart, whole()))
    assert same_bits(model.other.weight, apart["other.weight"])
    assert same_bits(model.head.weight, apart["head.weight"])
    model = Model()
    model.other = nn.Linear(K, 3, bias=False)
    tied = whole({"other.weight": "head.weight", "b.bias": "a.bias", "b.scales": "a.scales"})
    packed = layers()
    packed["b"] = replace(packed["b"], scales=packed["a"].scales)
    place(model, MemorySource(packed, floats(table=torch.randn(4)), tied))
    assert model.other.weight is model.head.weight
    assert model.b.bias is model.a.bias
    assert model.b.tile_scales is model.a.tile_scales
    assert model.b.tiles is not model.a.tiles


def test_codes_in_other_tiles_are_never_shared() -> None:
    """The same rows, but groups of 16 and 12: the second has other tiles, and would compute with the first's."""
    codes = random_layer(N, K, 16)
    other = replace(random_layer(N, K, 12), qweight=codes.qweight)
    source = MemorySource({"a": codes, "b": other}, floats(table=torch.ones(4)), whole({"b.qweight": "a.qweight"}))
    model = place(Model(bias=False), source)
    for name, packed in source.layers.items():
        assert_layer(model.get_submodule(name), packed)


def test_dtypes_and_ways_to_compute_of_a_whole_model() -> None:
    source = MemorySource(layers(), floats(table=torch.ones(4)), whole(b=(torch.bfloat16, "int8")))
    model = place(Model(), source)
    assert [(m.dtype, m.compute) for m in (model.a, model.b)] == [(torch.float32, "auto"), (torch.bfloat16, "int8")]
    assert place(Model(), source, torch.float16).b.dtype == torch.float16


# --- what does not fit --------------------------------------------------------------------------------------------------


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in floats().items() if key != name}


MISFITS: dict[str, tuple[Any, str]] = {
    "no parameter": (lambda: MemorySource(layers(), without("norm.weight")), r"lacks norm\.weight, which the model needs"),
    "no buffer": (lambda: MemorySource(layers(), without("steps")), "lacks steps, which the model needs"),
    "no buffer of a whole model": (lambda: MemorySource(layers(), floats(), whole()), "lacks table"),
    "a tensor too many": (lambda: MemorySource(layers(), floats(more=torch.ones(1))), "1 tensors that the model lacks"),
    "another shape": (lambda: MemorySource(layers(), floats(norm__weight=torch.ones(3))), r"norm\.weight has shape \(3,\)"),
    "integers": (
        lambda: MemorySource(layers(), floats(norm__weight=torch.ones(K, dtype=torch.int32))),
        r"norm\.weight has dtype torch\.int32",
    ),
    "no such layer": (lambda: MemorySource({"c": random_layer(N, K, G)}, floats()), "'c', the model has no such module"),
    "no Linear there": (lambda: MemorySource({"norm": random_layer(N, K, G)}, floats()), "has a LayerNorm there"),
    "other sizes": (lambda: MemorySource(layers() | {"b": random_layer(N, 48, G)}, floats()), "'b' is 48 -> 6 features"),
    "a bias in the model only": (lambda: MemorySource(layers(bias=False), floats()), "has a bias in the model only"),
    "fp32 scales": (lambda: MemorySource(layers(dtype=torch.float32), floats()), r"has float32 scales.*dtype=torch\.float16"),
    "a tie to nothing": (
        lambda: MemorySource(layers(), floats(), whole({"table": "nothing"})),
        "has nothing, which the model lacks",
    ),
    "a tie of nothing": (
        lambda: MemorySource(layers(), floats(table=torch.ones(4)), whole({"nothing": "table"})),
        "has nothing, which the model lacks",
    ),
    "a tie of another shape": (
        lambda: MemorySource(layers(), without("norm.weight") | {"table": torch.ones(4)}, whole({"norm.weight": "table"})),
        r"norm\.weight has shape \(4,\)",
    ),
    "unknown experts": (lambda: MemorySource(layers(), floats(), experts={"norm.weight": "linear"}), r"norm\.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(MISFITS))
def test_what_does_not_fit_changes_nothing(what: str) -> None:
    make, message = MISFITS[what]
    model = Model()
    before = Snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        place(model, make())
    before.assert_unchanged()


def test_a_bias_in_the_files_only() -> None:
    with pytest.raises(CheckpointError, match="has a bias in the files only"):
        place(Model(bias=False), MemorySource(layers(), floats()))
    # some writers give every layer one, of zeros
    zeros = {name: replace(layer, bias=torch.zeros(N)) for name, layer in layers().items()}
    assert place(Model(bias=False), MemorySource(zeros, floats())).a.bias is None


def test_a_buffer_on_the_meta_device_must_come_from_the_files() -> None:
    with torch.device("meta"):
        model = Model()
    with pytest.raises(CheckpointError, match="the buffer table is on the meta device"):
        place(model, MemorySource(layers(), floats()))


def test_tensors_that_the_model_lacks_are_warned_about_at_the_callers_line_or_passed_over() -> None:
    source = MemorySource(layers(), floats(more=torch.ones(1), known=torch.ones(1)))
    with pytest.warns(UserWarning, match="tensors for which Model has no place; they were left out: more") as caught:
        place(Model(), source, ignore=lambda name: name == "known")
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        place(Model(), source, ignore=lambda name: True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_scales_are_kept_where_16_bits_hold_them_else_rounded_for_a_16_bit_model(dtype: torch.dtype) -> None:
    exact = {name: replace(layer, scales=layer.scales.float()) for name, layer in layers(dtype=dtype).items()}
    model = place(Model(), MemorySource(exact, floats()))
    assert torch.equal(model.a.scales.float(), exact["a"].scales)
    rounded = layers(dtype=torch.float32)
    model = place(Model(), MemorySource(rounded, floats()), dtype)
    assert same_bits(model.a.scales, rounded["a"].scales.to(dtype))
