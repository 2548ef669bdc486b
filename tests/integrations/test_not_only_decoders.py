"""Models that are no decoders, from float to a directory and back: encoders, a reranker, a model that sees pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from not_only_decoders import (
    TEXT,
    Batch,
    as_published,
    bert,
    int4_layers,
    llava,
    made,
    mean_pooled,
    output,
    picture_batches,
    quantized,
    saved,
    text_batches,
)
from safetensors.torch import load_file
from torch import nn

import awq_ext
from awq_ext.integrations.registration import METHODS

transformers = pytest.importorskip("transformers", reason="Transformers NOT TESTED: pip install 'awq-ext[hf]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, at import

FORMATS = ("awq", "compressed-tensors", "gptq", "native")
TEXT_ALONE = ("*vision_tower*", "*multi_modal_projector*", "lm_head")


@pytest.fixture
def registered() -> Iterator[None]:
    """Transformers' own classes run on our layers, and afterwards no more."""
    from transformers.quantizers import auto

    tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    before = [dict(table) for table in tables]
    awq_ext.register_with_transformers(METHODS)
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def test_embeddings_stay_where_they_were() -> None:
    """Mean pooled states of texts that were not calibrated on: nearer to those of the float model than rounding brings them."""
    float_model, (held_out, *calib) = made(bert), text_batches(count=5, rows=8)

    def cosine(**settings: Any) -> float:
        model = quantized(made(bert), calib, **settings)
        mask = held_out["attention_mask"]
        pooled = [mean_pooled(output(each, held_out), mask) for each in (float_model, model)]
        return float(torch.cosine_similarity(*pooled, dim=-1).mean())

    rounded, found = cosine(method="rtn"), cosine(method="awq+gptq")
    assert rounded < found and 1 - found < 0.8 * (1 - rounded)
    assert found > 0.98


def assert_comes_back(model: nn.Module, batch: Batch, folder: Path) -> None:
    """From every format, through our reader and through Transformers' own class: the same layers, the same bits."""
    names, expected = int4_layers(model), output(model, batch)
    assert names
    for format in FORMATS:
        written = saved(model, folder, format)
        for again in (awq_ext.from_pretrained(written), type(model).from_pretrained(written)):
            assert type(again) is type(model) and int4_layers(again) == names, format
            assert torch.equal(output(again, batch), expected), format


@pytest.mark.parametrize("name", TEXT)
def test_models_of_text_come_back_the_same(name: str, tmp_path: Path, registered: None) -> None:
    batches = text_batches(count=1)
    assert_comes_back(quantized(made(TEXT[name]), batches), batches[0], tmp_path)


@pytest.mark.parametrize("skip", [("*multi_modal_projector*", "lm_head"), TEXT_ALONE], ids=["all", "text"])
def test_a_model_that_sees_comes_back_the_same(skip: tuple[str, ...], tmp_path: Path, registered: None) -> None:
    """Calibrated on pictures and text; with and without its vision tower in int4."""
    batch, other = picture_batches(count=2)
    model = quantized(made(llava), [batch], skip=skip)
    names = int4_layers(model)
    assert any("vision_tower" in name for name in names) == (skip is not TEXT_ALONE)
    assert sum("language_model" in name for name in names) == 14
    assert_comes_back(model, batch, tmp_path)
    changed = batch | {"pixel_values": other["pixel_values"]}
    assert not torch.equal(output(model, changed), output(model, batch)), "the picture changes nothing"


@pytest.mark.parametrize(
    ("format", "key"),
    [("awq", "modules_to_not_convert"), ("compressed-tensors", "ignore"), ("gptq", "modules_to_not_convert")],
)
def test_layers_left_float_are_told_by_both_their_names(format: str, key: str, tmp_path: Path) -> None:
    """LLaVA's files call the head ``language_model.lm_head``, transformers 5 asks for ``lm_head``; servers read the former."""
    model = quantized(
        made(llava), picture_batches(count=1), skip=("*.layers.0.*", "*multi_modal_projector*", "lm_head")
    )
    told = json.loads((saved(model, tmp_path, format) / "config.json").read_text())["quantization_config"][key]
    for pair in (
        ("language_model.lm_head", "lm_head"),
        ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        ("language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("vision_tower.encoder.layers.0.mlp.fc1", "model.vision_tower.encoder.layers.0.mlp.fc1"),
    ):
        assert set(pair) <= set(told)
    assert len(told) == len(set(told)) and not any(".layers.1." in name for name in told)


@pytest.mark.parametrize(("format", "key"), [("awq", "modules_to_not_convert"), ("compressed-tensors", "ignore")])
def test_names_stay_those_of_the_files_it_came_from(format: str, key: str, tmp_path: Path, registered: None) -> None:
    """vLLM's own LLaVA knows the names that files of the hub have, and no others."""
    batch = picture_batches(count=1)[0]
    model = quantized(as_published(made(llava), tmp_path / "float"), [batch], skip=TEXT_ALONE)
    folder = saved(model, tmp_path, format)
    tower = {name for name in load_file(folder / "model.safetensors") if name.startswith("vision_tower")}
    assert tower and all(name.startswith("vision_tower.vision_model.") for name in tower)
    told = json.loads((folder / "config.json").read_text())["quantization_config"][key]
    assert {
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
        "model.vision_tower.encoder.layers.0.mlp.fc1",
    } <= set(told)
    again = type(model).from_pretrained(folder)
    assert torch.equal(output(again, batch), output(model, batch))
    assert torch.equal(output(awq_ext.from_pretrained(folder), batch), output(model, batch))


def test_groups_of_layers_are_told_by_both_their_names(tmp_path: Path) -> None:
    per_layer = {"*language_model*": {"bits": 8}}
    model = quantized(made(llava), picture_batches(count=1), per_layer=per_layer, skip=("*projector*", "lm_head"))
    folder = saved(model, tmp_path, "compressed-tensors")
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    targets = {group["weights"]["num_bits"]: set(group["targets"]) for group in groups}
    layer = "layers.1.mlp.up_proj"
    assert {f"language_model.model.{layer}", f"model.language_model.{layer}"} <= targets[8]
    assert {name for name in targets[4] if "language_model" in name} == set()
    again = awq_ext.from_pretrained(folder)
    assert {name for name in int4_layers(again) if again.get_submodule(name).bits == 8} == {
        name for name in int4_layers(model) if "language_model" in name
    }
