"""AwqConfig: what it accepts, what it refuses, and in which words."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest
import torch
from torch import nn

import awq_ext
from awq_ext import AwqConfig
from awq_ext.config import configured


def test_the_defaults_are_those_of_the_paper() -> None:
    config = AwqConfig()
    assert (config.method, config.bits, config.group_size, config.symmetric, config.n_grid) == (
        "awq",
        4,
        128,
        False,
        20,
    )


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("method", "gptq2", ValueError),
        ("bits", 5, ValueError),
        ("bits", 3, ValueError),
        ("bits", "4", TypeError),
        ("bits", True, TypeError),
        ("bits", 4.0, TypeError),
        ("group_size", 0, ValueError),
        ("group_size", -2, ValueError),
        ("group_size", 100, ValueError),
        ("group_size", 64.0, TypeError),
        ("group_size", "64", TypeError),
        ("group_size", None, TypeError),
        ("group_size", True, TypeError),
        ("symmetric", 1, ValueError),
        ("scale_dtype", "float32", ValueError),
        ("scale_dtype", torch.float16, ValueError),
        ("n_grid", 0, ValueError),
        ("n_grid", 2.5, TypeError),
        ("search_rows", -1, ValueError),
        ("weighed_batches", -1, ValueError),
        ("weighed_batches", True, TypeError),
        ("objective", "block", ValueError),
        ("clip", "yes", ValueError),
        ("clip", 1, ValueError),
        ("fold", True, ValueError),
        ("propagate", "int4", ValueError),
        ("packed", 0, ValueError),
        ("head", "int3", ValueError),
        ("head", True, ValueError),
        ("skip", "lm_head", TypeError),
        ("skip", (1,), TypeError),
        ("seq_len", 1, ValueError),
    ],
)
def test_a_bad_value_is_named_with_its_field(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        AwqConfig(**{field: value})
    assert f"AwqConfig.{field}" in str(caught.value)
    assert repr(value) in str(caught.value)


def test_an_effort_as_the_method_is_told_its_own_field() -> None:
    with pytest.raises(ValueError, match=r"'awq\+gptq'; an effort is given as effort=\"best\"$"):
        AwqConfig(method="best")


@pytest.mark.parametrize("field", ["method", "group_size", "scale_dtype", "clip", "fold", "propagate"])
def test_a_refused_choice_lists_the_choices(field: str) -> None:
    bad = 7 if field == "group_size" else "nonsense"
    with pytest.raises(ValueError, match="choose one of") as caught:
        AwqConfig(**{field: bad})
    assert repr(getattr(AwqConfig(), field)) in str(caught.value)


def test_four_and_eight_bits_can_be_packed() -> None:
    assert [AwqConfig(bits=bits).packed for bits in (4, 8)] == [True, True]
    mixed = AwqConfig(per_layer={"*.down_proj": {"bits": 8}})
    assert [mixed.for_layer(f"0.{name}_proj").bits for name in ("up", "down")] == [4, 8]


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_other_bits_need_packed_false(bits: int) -> None:
    assert AwqConfig(bits=bits, packed=False).bits == bits
    with pytest.raises(ValueError, match=f"bits={bits}: packed layers hold 4 or 8 bits.*packed=False"):
        AwqConfig(bits=bits)


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 8"):
        AwqConfig(bits=bits, packed=False)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AwqConfig().bits = 3  # type: ignore[misc]


def test_json_round_trip() -> None:
    config = AwqConfig(group_size=-1, clip=True, skip=["a.*", "b"], scale_dtype="bfloat16")  # type: ignore[arg-type]
    assert config.skip == ("a.*", "b")
    assert AwqConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(TypeError, match=r"no field efort [(]given efort='best'[)]: did you mean effort[?]"):
        AwqConfig(efort="best")
    with pytest.raises(ValueError, match=r"no field nothing \(given nothing=1\); its fields are .*bits"):
        AwqConfig.from_dict({"nothing": 1})
    with pytest.raises(TypeError, match=r"awq_ext\.save_pretrained\(model, directory, format='gguf'\)"):
        AwqConfig(format="gguf")


def test_a_mistyped_argument_of_quantize_is_told_without_its_value() -> None:
    says = r"no field tokenzer \(given tokenzer=a list\): did you mean tokenizer\?$"
    with pytest.raises(TypeError, match=says):
        awq_ext.quantize(nn.Linear(16, 16), [torch.zeros(1, 16)], tokenzer=["a long value"] * 20)
    with pytest.raises(TypeError, match=r"tokenizer='x'\): it is an argument of awq_ext\.quantize, no setting$"):
        AwqConfig(tokenizer="x")


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("group_sise", "group_size"),
        ("sym", "symmetric"),
        ("desc_act", "act_order"),
        ("ignore", "skip"),
        ("clips", "clip"),
    ],
)
def test_a_mistyped_field_is_answered_with_the_nearest(mistyped: str, meant: str) -> None:
    says = rf"no field {mistyped} \(given {mistyped}=7\): did you mean {meant}\?"
    with pytest.raises(TypeError, match=says):  # as Python has it for an unknown keyword
        AwqConfig(**{mistyped: 7})
    with pytest.raises(TypeError, match=says):
        configured(None, {mistyped: 7})
    with pytest.raises(ValueError, match=says):
        configured({mistyped: 7}, {})
    with pytest.raises(ValueError, match=rf"per_layer\['\*'\]: .*{says}"):
        AwqConfig(per_layer={"*": {mistyped: 7}})


AUTOAWQ = {"zero_point": False, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}


def test_autoawqs_dict_is_understood() -> None:
    expected = AwqConfig(group_size=64, symmetric=True)
    assert AwqConfig(**AUTOAWQ) == AwqConfig.from_dict(AUTOAWQ) == configured(AUTOAWQ, {}) == expected
    assert configured(None, AUTOAWQ) == configured(AwqConfig(clip=False), {**AUTOAWQ, "clip": "auto"}) == expected
    saved = {
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "quant_method": "awq",
        "modules_to_not_convert": ["visual"],
    }
    assert AwqConfig(**saved) == AwqConfig(group_size=64, skip=("*visual*",))
    assert AwqConfig(**{**AUTOAWQ, "modules_to_not_convert": None}) == expected
    assert AwqConfig(per_layer={"*.up": {"q_group_size": 32}}).per_layer == {"*.up": {"group_size": 32}}


def test_a_layout_of_autoawq_is_chosen_when_saving() -> None:
    with pytest.warns(
        UserWarning, match=r"version='GEMV_Fast' is a layout.*save_pretrained.*format=\"gemv_fast\""
    ) as told:
        AwqConfig(**{**AUTOAWQ, "version": "GEMV_Fast"})
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"w_bit": 4, "bits": 4}, "w_bit=4 sets bits, which is given too"),
        ({"zero_point": 1}, "zero_point=1: True"),
        ({"version": "GEMX"}, "version='GEMX': AutoAWQ has GEMM"),
        ({"quant_method": "gptq"}, "quant_method='gptq' is the config of another method"),
    ],
)
def test_a_wrong_dict_of_autoawq(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        AwqConfig(**settings)


def test_the_signature_shows_the_fields() -> None:
    assert "group_size" in inspect.signature(AwqConfig).parameters


def test_what_the_kernels_get() -> None:
    assert AwqConfig(group_size=32, scale_dtype="bfloat16").quantizer == {
        "group_size": 32,
        "bits": 4,
        "symmetric": False,
        "scale_dtype": torch.bfloat16,
    }


def test_the_former_name_of_head() -> None:
    assert AwqConfig(quantize_head=True).head == AwqConfig.from_dict({"quantize_head": True}).head == "int4"
    assert AwqConfig(quantize_head=False).head == AwqConfig().head == "float"
    with pytest.raises(TypeError, match="quantize_head=True sets head, which is given too"):
        AwqConfig(quantize_head=True, head="int8")
    with pytest.raises(ValueError, match="quantize_head=1: choose one of True, False"):
        AwqConfig(quantize_head=1)


def test_what_head_means_for_the_output_layer() -> None:
    config = AwqConfig(head="int4", method="gptq", per_layer={"*head": {"group_size": 32}, "lm_*": {"group_size": 16}})
    found = config.with_heads(["lm_head"]).for_layer("lm_head")
    assert (found.bits, found.method, found.group_size) == (4, "gptq", 32)
    assert config.with_heads(["lm_head"]).for_layer("a.head").group_size == 32
    assert AwqConfig(head="int4", packed=False, bits=3).with_heads(["lm_head"]).for_layer("lm_head").bits == 4
    own = AwqConfig(head="int4", packed=False, per_layer={"lm_head": {"bits": 3}}).with_heads(["lm_head"])
    assert own.for_layer("lm_head").bits == 3
    fake = AwqConfig(head="int8", packed=False).with_heads(["a+b.lm_head"]).for_layer("a+b.lm_head")
    assert (fake.bits, fake.method) == (8, "rtn")


def test_an_effort_stands_for_fields_and_those_given_beside_it_count() -> None:
    assert AwqConfig(effort="fast") == AwqConfig(
        method="awq+gptq", builtin_text=True, max_calib_tokens=8192, n_grid=10, refine=0, objective="layer"
    )
    assert AwqConfig(effort="balanced") == AwqConfig(method="awq+gptq", builtin_text=True, max_calib_tokens=16384)
    best = AwqConfig(effort="best")
    assert best.method == "awq+gptq"
    assert best.learn_rounding > 0
    assert "effort" not in best.to_dict()
    assert AwqConfig.from_dict(best.to_dict()) == best
    most = {"max_calib_tokens": 0, "group_size": 64}
    assert AwqConfig(effort="best", learn_rounding=0, **most) == AwqConfig(effort="balanced", **most)
    assert AwqConfig("gptq", effort="best").method == "gptq"
    assert AwqConfig("gptq", effort="best").learn_rounding == best.learn_rounding


def test_an_effort_in_overrides_counts_more_than_the_config() -> None:
    before = AwqConfig(method="rtn", group_size=32)
    after = configured(before, {"effort": "balanced"})
    assert (after.method, after.group_size) == ("awq+gptq", 32)
    assert dataclasses.replace(before, effort="balanced") == after
    assert configured({"effort": "best", "w_bit": 8}, {}) == AwqConfig(effort="best", bits=8)
    assert configured(None, {"effort": "fast", "method": "gptq"}).method == "gptq"


@pytest.mark.parametrize("effort", ["turbo", 3, None])
def test_an_unknown_effort_is_an_error_that_lists_the_choices(effort: object) -> None:
    with pytest.raises(ValueError, match=r"AwqConfig.effort=.*'fast', 'balanced', 'best'"):
        AwqConfig(effort=effort)
