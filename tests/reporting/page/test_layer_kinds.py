"""Kinds of layers: by name, with their places in a plot, and colours that can be seen on both grounds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from awq_ext import LayerReport
from awq_ext.reporting.page import layer_kinds
from awq_ext.reporting.page.layer_kinds import KINDS, by_kind, depth_of, in_blocks, kind_of, place_name

LIGHT, DARK = "#ffffff", "#1b2229"  # --paper of page.css


def rows(*names: str) -> list[LayerReport]:
    return [LayerReport(name, 1, 1, "int4") for name in names]


def luminance(color: str) -> float:
    """WCAG 2.2's relative luminance."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_every_kind_has_a_colour_and_a_marker_of_its_own() -> None:
    for values in zip(*((s.light, s.dark, s.marker) for s in KINDS.values()), strict=True):
        assert len(set(values)) == len(KINDS) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_colours_are_told_from_their_ground(kind: str) -> None:
    assert contrast(KINDS[kind].light, LIGHT) >= 4.5
    assert contrast(KINDS[kind].dark, DARK) >= 4.5


@pytest.mark.parametrize(("part", "paper"), [(0, LIGHT), (1, DARK)], ids=["light", "dark"])
def test_the_warmest_cells_and_all_words_can_be_read(part: int, paper: str) -> None:
    css = Path(layer_kinds.__file__).with_name("page.css").read_text()
    found = {
        name: values[part]
        for name in re.findall(r"--([\w-]+):", css)
        if len(values := re.findall(rf"--{name}: ([^;]+);", css)) == 2
    }
    assert re.sub("^#fff$", LIGHT, found["paper"]) == paper
    (most,) = map(float, re.findall(r"rgb\(var\(--heat\) / calc\(var\(--h\) \* ([\d.]+)\)\)", css))
    ground = [int(paper[i : i + 2], 16) for i in (1, 3, 5)]
    warm = [round(most * int(h) + (1 - most) * g) for h, g in zip(found["heat"].split(), ground, strict=True)]
    assert contrast(found["ink"], "#" + bytes(warm).hex()) >= 4.5
    for name in ("ink", "soft", "good", "fair", "bad"):
        assert contrast(found[name], paper) >= 4.5, name
    for name in ("ink", "fair", "soft"):
        assert contrast(found[name], found["warn-back"]) >= 4.5, name


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("q", "model.layers.3.self_attn.q_proj layers.0.attention.wq encoder.layer.1.attention.self.query h.0.attn.c_attn"),
        ("q", "gpt_neox.layers.0.attention.query_key_value model.layers.0.self_attn.q_a_proj"),
        ("k", "model.layers.3.self_attn.k_proj encoder.layer.1.attention.self.key layers.0.self_attn.kv_a_proj_with_mqa"),
        ("v", "model.layers.3.self_attn.v_proj encoder.layer.1.attention.self.value layers.0.attention.wv"),
        ("o", "model.layers.3.self_attn.o_proj h.0.attn.c_proj layers.0.attention.wo encoder.layer.1.attention.output.dense"),
        ("o", "decoder.layers.0.self_attn.out_proj gpt_neox.layers.0.attention.dense block.0.layer.0.SelfAttention.o"),
        ("gate", "model.layers.3.mlp.gate_proj model.layers.3.mlp.gate_up_proj block.0.layer.1.DenseReluDense.wi_0"),
        ("up", "model.layers.3.mlp.up_proj h.0.mlp.c_fc encoder.layer.1.intermediate.dense layers.0.mlp.dense_h_to_4h"),
        ("down", "model.layers.3.mlp.down_proj h.0.mlp.c_proj encoder.layer.1.output.dense layers.0.fc2"),
        ("q", "decoder.block.0.layer.0.SelfAttention.q"),
        ("o", "blocks.0.attn.proj"),
        ("gate", "layers.0.feed_forward.w1"),
        ("up", "layers.0.fc1"),
        ("down", "block.0.layer.1.DenseReluDense.wo"),
        ("experts", "layers.0.block_sparse_moe.experts.7.w1 model.layers.0.mlp.experts.3.down_proj"),
        ("gate", "model.layers.0.mlp.shared_experts.gate_proj"),
        ("head", "lm_head model.embed_out classifier"),
        ("other", "layers.0.mixer.x_proj layers.0.mlp.gate fc a.b 3 layers.0.mlp.proj"),
    ],
)  # fmt: skip
def test_kinds_go_by_the_names_that_models_use(kind: str, names: str) -> None:
    assert {name: kind_of(name) for name in names.split()} == dict.fromkeys(names.split(), kind)


def test_blocks() -> None:
    assert [depth_of(name) for name in ("layers.3.experts.7.w1", "lm_head", "blocks.7")] == [3, None, None]
    kinds = by_kind(rows("h.0.q", "h.0.k", "h.1.q", "h.1.k", "lm_head"))
    assert {kind: [x for x, _ in pairs] for kind, pairs in kinds.items()} == {"q": [0, 1], "k": [0, 1], "head": [2]}
    before = by_kind(rows("embed.in", "h.0.q", "h.1.q"))
    assert {kind: [x for x, _ in pairs] for kind, pairs in before.items()} == {"q": [0, 1], "other": [-1]}
    # a chain, not blocks
    assert not in_blocks(rows("0.a", "1.b", "2.c")) and in_blocks(rows("h.0.q", "h.1.q"))
    assert [x for x, _ in by_kind(rows("0.a", "4.b", "lm"))["other"]] == [0, 1, 2]
    assert by_kind([]) == {}


def test_experts_stand_side_by_side_in_their_block() -> None:
    names = [f"{i}.experts.{e}.w{k}" for i in range(3) for k in (1, 2) for e in range(16)]
    (pairs,) = by_kind(rows(*names)).values()
    places = [place for place, _ in pairs]
    assert [round(place) for place in places] == [0] * 32 + [1] * 32 + [2] * 32
    assert places == sorted(set(places)) and sum(places[:32]) == pytest.approx(0)
    assert [row.name for _, row in pairs] == names


def test_labels_are_short() -> None:
    named = {
        "model.layers.13.mlp.up_proj": "13 up",
        "model.layers.1.mlp.experts.7.w2": "1 experts.7.w2",
        "layers.2.mixer.x_proj": "2 mixer.x_proj",
        "model.lm_head": "model.lm_head",
    }
    assert {row.name: place_name(row) for row in rows(*named)} == named
