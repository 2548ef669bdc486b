"""Kinds of layers: by name, with their places in a plot."""

from __future__ import annotations

import pytest

from awq_ext import LayerReport
from awq_ext.reporting.layer_kinds import MOST_KINDS, by_kind, depth_and_kind, short_names
from awq_ext.reporting.plots import STYLES


def test_every_kind_has_a_style_of_its_own() -> None:
    assert len(set(STYLES)) == len(STYLES) == MOST_KINDS


def test_names_of_layers() -> None:
    assert depth_and_kind("model.layers.3.mlp.up_proj") == (3, "mlp.up_proj")
    assert depth_and_kind("layers.3.experts.7.w1") == (3, "experts.*.w1")
    assert depth_and_kind("lm_head") == (None, "lm_head")
    assert depth_and_kind("blocks.7") == (None, "blocks.7")
    row = lambda name: LayerReport(name, 1, 1, "int4")  # noqa: E731
    kinds = by_kind([row("h.0.a"), row("h.0.b"), row("h.1.a"), row("h.1.b")])
    assert {kind: [x for x, _ in pairs] for kind, pairs in kinds.items()} == {"a": [0, 1], "b": [0, 1]}
    assert list(by_kind([row("0.a"), row("1.b")])) == ["layers"]
    assert list(by_kind([row(f"{i}.{letter}") for i in range(2) for letter in "abcdefghijklmnopq"])) == ["layers"]


def test_experts_stand_side_by_side_in_their_block() -> None:
    names = [f"{i}.experts.{e}.w{k}" for i in range(3) for k in (1, 2) for e in range(16)]
    kinds = by_kind([LayerReport(name, 1, 1, "int4") for name in names])
    assert list(kinds) == ["experts.*.w1", "experts.*.w2"]
    places = [place for place, _ in kinds["experts.*.w1"]]
    assert [round(place) for place in places] == [0] * 16 + [1] * 16 + [2] * 16
    assert places == sorted(set(places)) and sum(places[:16]) == pytest.approx(0)
    assert [row.name for _, row in kinds["experts.*.w1"]][:2] == ["0.experts.0.w1", "0.experts.1.w1"]


def test_kinds_are_named_as_shortly_as_can_be_told_apart() -> None:
    assert short_names(
        ["self_attn.q_proj", "mlp.experts.*.w1", "mlp.shared.w1", "mlp.experts.gate_up_proj.*", "w3"]
    ) == {
        "self_attn.q_proj": "q_proj",
        "mlp.experts.*.w1": "experts.*.w1",
        "mlp.shared.w1": "shared.w1",
        "mlp.experts.gate_up_proj.*": "gate_up_proj.*",
        "w3": "w3",
    }
    assert short_names(["layers"]) == {"layers": "layers"}
    assert short_names(["proj", "a.proj"]) == {"proj": "proj", "a.proj": "a.proj"}
