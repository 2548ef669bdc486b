"""Which layers a config selects: patterns, functions, thresholds, the output layer by identity; and settings by layer."""

from __future__ import annotations

import json
from typing import Any

import models
import pytest
import torch
from checks import Snapshot
from torch import Tensor, nn

import awq_ext
from awq_ext import AwqConfig, QuantLinear
from awq_ext.modules import output_embeddings
from awq_ext.survey.selection import eligible_linears

FAST: dict[str, Any] = {"n_grid": 3, "group_size": 16, "progress": False}


def quantized(**settings: Any) -> nn.Module:
    case = models.make("llama")
    return awq_ext.quantize(case.model, case.batches, **FAST | settings)


def int4_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def notes(model: nn.Module) -> dict[str, str]:
    return {row.name: row.note for row in model.awq_report.layers if row.status == "float"}


EVERY = {
    f"layers.{i}.{leaf}"
    for i in range(3)
    for leaf in (*(f"attention.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
}


def test_skip_takes_patterns_and_functions() -> None:
    model = quantized(skip=("lm_head", "*.k_proj", lambda name, module: module.in_features == models.INNER))
    assert int4_layers(model) == {name for name in EVERY if not name.endswith(("k_proj", "down_proj"))}
    assert notes(model).pop("lm_head") == "the output layer, by its name"
    assert {why for name, why in notes(model).items() if name != "lm_head"} == {"skipped by pattern"}
    assert len(notes(model)) == 3 + 3 + 1


def test_only_takes_patterns_and_functions() -> None:
    model = quantized(only=("*.up_proj", lambda name, _: name == "layers.1.attention.o_proj"))
    assert int4_layers(model) == {name for name in EVERY if name.endswith("up_proj")} | {"layers.1.attention.o_proj"}
    assert notes(model)["layers.0.attention.q_proj"] == "not among `only`"


def test_skip_comes_before_only() -> None:
    assert int4_layers(quantized(only=("layers.0.*",), skip=("*.mlp.*",))) == {
        f"layers.0.attention.{p}_proj" for p in "qkvo"
    }


def test_small_layers_stay() -> None:
    model = quantized(min_weights=models.HIDDEN * models.INNER)
    assert int4_layers(model) == {name for name in EVERY if ".mlp." in name}
    head = models.KV_HEADS * models.HIDDEN // models.HEADS
    assert notes(model)["layers.2.attention.k_proj"] == (
        f"has {models.HIDDEN * head} weights, fewer than min_weights={models.HIDDEN * models.INNER}"
    )


def test_nothing_selected_names_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"no Linear is left to quantize: .*layers\.0\..*: not among `only`"):
        quantized(only=(lambda *_: False,))


class Headed(models.Net):
    """A model whose output layer has a name of its own, as transformers tells it."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head, self.unembed = None, nn.Linear(models.HIDDEN, models.VOCAB, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def forward(self, ids: Tensor) -> Tensor:
        self.lm_head = nn.Identity()
        return self.unembed(super().forward(ids))


def test_the_output_layer_is_left_by_identity() -> None:
    torch.manual_seed(0)
    model = awq_ext.quantize(Headed(), models.token_batches(), blocks=[], **FAST)
    assert int4_layers(model) == EVERY
    assert notes(model) == {"unembed": "the model's output embeddings"}
    torch.manual_seed(0)
    assert int4_layers(awq_ext.quantize(Headed(), models.token_batches(), blocks=[], quantize_head=True, **FAST)) == {
        *EVERY,
        "unembed",
    }


def test_models_without_an_output_layer() -> None:
    class Unwilling(nn.Module):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    assert output_embeddings(Unwilling()) is None
    assert output_embeddings(nn.Linear(2, 2)) is None


def test_settings_by_layer() -> None:
    model = quantized(
        per_layer={
            "*.down_proj": {"group_size": 32, "symmetric": True},
            "layers.0.*": {"bits": 8, "packed": False},
            "layers.2.attention.*": {"method": "rtn", "scale_dtype": "bfloat16"},
            "*": {"clip": False},
        }
    )
    rows = {row.name: row for row in model.awq_report.layers}
    for name in EVERY:
        row, layer = rows[name], model.get_submodule(name)
        if name.endswith("down_proj"):  # the first pattern that fits counts
            assert (row.status, row.bits, row.group_size, layer.group_size) == ("int4", 4, 32, 32)
            assert (layer.zeros == 8).all()
        elif name.startswith("layers.0."):
            assert (row.status, row.bits, row.applied in ("weights", "")) == ("fake", 8, True)
            assert type(layer) is nn.Linear
        else:
            assert (row.status, row.bits, row.group_size, layer.group_size) == ("int4", 4, 16, 16)
            rtn = name.startswith("layers.2.attention")
            assert row.method == ("rtn" if rtn else "awq")
            assert layer.scales.dtype == (torch.bfloat16 if rtn else torch.float16)
            assert rtn <= (row.scale == "identity")
            assert not row.clipped
    assert all(row.loss <= row.loss_rtn for row in rows.values() if row.loss is not None)
    assert rows["layers.0.mlp.up_proj"].loss < 0.1 * rows["layers.1.mlp.up_proj"].loss  # 8 bits


def test_layers_of_four_and_eight_bits_in_one_model() -> None:
    """8 bits packed and 8 bits rounded in a float weight are the same weights, but for 1/s: multiplied by, or divided."""
    mixed = quantized(per_layer={"layers.0.*": {"bits": 8}, "*.v_proj": {"bits": 8}}, fold="never")
    rounded = quantized(per_layer={"layers.0.*": {"bits": 8, "packed": False}}, fold="never")
    for name in EVERY:
        row, layer = mixed.awq_report[name], mixed.get_submodule(name)
        bits = 8 if name.startswith("layers.0.") or name.endswith("v_proj") else 4
        assert (row.status, row.bits, layer.bits, layer.group_size) == (f"int{bits}", bits, bits, 16)
        if name.startswith("layers.0."):
            expected = rounded.get_submodule(name).weight.detach()
            torch.testing.assert_close(layer.weight * 1.0, expected, rtol=2.0**-22, atol=0)
    rows = mixed.awq_report
    assert rows["layers.0.mlp.up_proj"].loss < 0.1 * rows["layers.1.mlp.up_proj"].loss
    assert rows["layers.1.attention.v_proj"].group == "layers.1.attention.q_proj"


def test_members_of_a_group_may_differ_in_bits_and_group_size() -> None:
    fields = {"*.k_proj": {"group_size": 32}, "*.v_proj": {"symmetric": True}}
    rows = {row.name: row for row in quantized(per_layer=fields).awq_report.layers}
    group = [rows[f"layers.1.attention.{p}_proj"] for p in "qkv"]
    assert {row.group for row in group} == {"layers.1.attention.q_proj"}
    assert len({row.alpha for row in group}) == 1
    assert [row.group_size for row in group] == [16, 32, 16]


def test_members_of_different_methods_share_no_scale() -> None:
    """One that is only rounded must not be scaled, so what they both read cannot be divided either."""
    rows = {row.name: row for row in quantized(per_layer={"*.k_proj": {"method": "rtn"}}).awq_report.layers}
    q, k, v = (rows[f"layers.1.attention.{p}_proj"] for p in "qkv")
    assert q.group == v.group == "layers.1.attention.q_proj"
    assert k.group == "layers.1.attention.k_proj"
    assert (k.scale, k.method) == ("identity", "rtn")
    assert q.applied in ("run time", "")


@pytest.mark.parametrize(
    ("per_layer", "error", "words"),
    [
        ([("*", {})], TypeError, "a dict of name pattern"),
        ({"*": 3}, TypeError, r"per_layer\['\*'\]=3"),
        ({3: {}}, TypeError, "a name pattern"),
        ({"*": {"fold": "never"}}, ValueError, r"sets fold: one layer can have its own method, bits"),
        ({"*": {"bits": 6}}, ValueError, r"per_layer\['\*'\]: AwqConfig.bits=6: packed layers hold 4 or 8 bits"),
        ({"*": {"group_size": 20}}, ValueError, r"per_layer\['\*'\]: AwqConfig.group_size=20"),
        ({"*": {"bits": "4"}}, TypeError, r"per_layer\['\*'\]: AwqConfig.bits='4'"),
    ],
)
def test_bad_settings_by_layer(per_layer: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        AwqConfig(per_layer=per_layer)


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    case = models.make("llama")
    before = Snapshot(case.model)
    with pytest.raises(
        ValueError, match=r"per_layer\['\*\.dwon_proj'\] fits none of the 21 layers: did you mean \*\.down_proj\?"
    ):
        awq_ext.quantize(case.model, case.batches, per_layer={"*.dwon_proj": {"group_size": 32}}, **FAST)
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("attention", "*.attention.*"),  # a part of a name, as in other tools
        ("layers.0", "layers.0.*"),  # a module that holds layers
        ("k_proj", "*.k_proj"),
        ("*.dwon_proj", "*.down_proj"),
        ("layer.0.mlp.*", "layers.0.mlp.*"),
        ("re:mlp", "re:.*mlp.*"),
    ],
)
@pytest.mark.parametrize("field", ["skip", "only"])
def test_a_pattern_for_no_layer_names_the_nearest(field: str, pattern: str, nearest: str) -> None:
    case = models.make("llama")
    before = Snapshot(case.model)
    with pytest.raises(ValueError) as caught:
        awq_ext.quantize(case.model, case.batches, **FAST, **{field: (pattern,)})
    assert f"AwqConfig.{field}={pattern!r} fits none of the 22 layers: did you mean {nearest}" in str(caught.value)
    before.assert_unchanged()


def test_a_pattern_like_no_layer_is_told_what_names_are_like() -> None:
    with pytest.raises(
        ValueError, match=r"skip='zzz' fits none of the 22 layers, whose names are like layers\.0\."
    ) as caught:
        quantized(skip=("zzz",))
    assert "did you mean" not in str(caught.value)


def test_skip_may_name_what_stays_float_anyway() -> None:
    """Lists of other tools name embeddings, norms and the head too."""
    assert int4_layers(quantized(skip=("lm_head", "re:.*lm_head", "<output embeddings>", "embed", "*norm"))) == EVERY
    with pytest.raises(ValueError, match=r"only='embed' fits none"):
        quantized(only=("embed",))


def test_regular_expressions_fit_whole_names() -> None:
    settings = {"skip": (r"re:layers\.[01]\..*",), "per_layer": {r"re:.*\.(q|k)_proj": {"group_size": 32}}}
    rows = {row.name: row for row in quantized(**settings).awq_report.layers if row.status == "int4"}
    assert rows.keys() == {name for name in EVERY if name.startswith("layers.2.")}
    assert {name for name, row in rows.items() if row.group_size == 32} == {
        "layers.2.attention.q_proj",
        "layers.2.attention.k_proj",
    }


@pytest.mark.parametrize("settings", [{"skip": ("re:(",)}, {"only": ("re:(",)}, {"per_layer": {"re:(": {}}}])
def test_a_broken_regular_expression_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'re:\(' is no regular expression: missing \)"):
        AwqConfig(**settings)


def test_the_head_is_skipped_beside_what_skip_names_unless_asked_for() -> None:
    assert int4_layers(quantized(skip=("*.mlp.*",))) == {name for name in EVERY if ".mlp." not in name}
    assert int4_layers(quantized(skip=())) == EVERY
    head = quantized(quantize_head=True).awq_report["lm_head"]
    assert head.status == "int4" and head.loss < head.loss_rtn  # calibrated, though it lies behind the blocks
    assert int4_layers(quantized(quantize_head=True, skip=("lm_head",))) == EVERY


@pytest.mark.parametrize("field", ["skip", "only"])
@pytest.mark.parametrize("value", ["lm_head", (3,), None, 7])
def test_selectors_of_other_kinds(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"AwqConfig.{field}=.*give a tuple of name patterns"):
        AwqConfig(**{field: value})


def test_the_json_of_a_config_names_its_functions() -> None:
    def wide(name: str, module: nn.Linear) -> bool:
        return module.in_features > 100

    config = AwqConfig(skip=("a.*", wide), only=[wide], per_layer={"b": {"group_size": 32}})  # type: ignore[arg-type]
    told = json.loads(json.dumps(config.to_dict()))
    name = f"<{wide.__qualname__}>"
    assert (told["skip"], told["only"], told["per_layer"]) == (["a.*", name], [name], {"b": {"group_size": 32}})
    assert AwqConfig.from_dict(told).per_layer == config.per_layer
    assert hash(config) == hash(AwqConfig(skip=("a.*", wide), only=(wide,)))


def never(*_: object) -> None:
    """No reason to leave any layer out."""


def test_eligible_linears_of_a_model() -> None:
    skipped = ("lm_head", "k_proj")
    found = eligible_linears(models.Net(), lambda name, _: "skipped by pattern" if name.endswith(skipped) else None)
    assert len(found.linears) == 18
    assert found.reasons == dict.fromkeys(
        ["layers.0.attention.k_proj", "layers.1.attention.k_proj", "layers.2.attention.k_proj", "lm_head"],
        "skipped by pattern",
    )


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_reasons_to_leave_a_linear() -> None:
    embedding, tied, bad = nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = embedding.weight
    with torch.no_grad():
        bad.weight[1, 2] = float("nan")
    parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    twice = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "embedding": embedding,
            "tied": tied,
            "own": OwnForward(4, 4),
            "parametrized": parametrized,
            "bad": bad,
            "one": twice,
            "two": twice,
            "good": nn.Linear(4, 4),
        }
    )
    found = eligible_linears(model, never)
    assert list(found.linears) == ["good"]
    assert found.reasons == {
        "tied": "its weight is shared with embedding.weight",
        "own": "OwnForward has a forward of its own",
        "parametrized": "its weight is computed by a parametrization",
        "bad": "its weight holds NaN or Inf",
        "one": "its weight is shared with two.weight",
        "two": "its weight is shared with one.weight",
    }


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (QuantLinear(4, 4, -1), "x is a QuantLinear already"),
        (nn.Linear(4, 4, device="meta"), "x.weight is on the meta device"),
        (nn.Linear(4, 4, dtype=torch.float64), "x.weight is torch.float64: float32, bfloat16 or float16"),
    ],
)
def test_models_that_are_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eligible_linears(nn.ModuleDict({"x": module}), never)


def test_integer_weights_are_refused() -> None:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"x\.weight is torch\.int8"):
        eligible_linears(nn.ModuleDict({"x": linear}), never)
