"""Quantization settings in the config of a part of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_dirs import assert_holds, edit_json, make_directory
from tiny_transformers import BATCH, float_model, logits

import awq_ext
from awq_ext import CheckpointError
from awq_ext.checkpoints.quantized_dir import QuantDir


def moved(*places: str) -> Any:
    """Move quantization_config from the top into the configs of parts, ``a.b`` inside ``a``."""

    def change(config: dict[str, Any]) -> None:
        settings = config.pop("quantization_config")
        for place in places:
            part = config
            for key in place.split("."):
                part = part.setdefault(key, {"hidden_size": 128})
            part["quantization_config"] = settings

    return change


@pytest.mark.parametrize("places", [["text_config"], ["llm_config"], ["thinker_config.text_config"], ["a", "b.c"]])
def test_settings_in_the_config_of_a_part(places: list[str], tmp_path: Path) -> None:
    layers = make_directory(tmp_path / "a", "gptq")
    edit_json(tmp_path / "a" / "config.json", moved(*places))
    assert_holds(tmp_path / "a", layers)
    awq_ext.convert(tmp_path / "a", tmp_path / "b", format="compressed-tensors")
    text = (tmp_path / "b" / "config.json").read_text()
    assert text.count("quantization_config") == 1, "the settings of another layout stayed behind"
    assert json.loads(text)["quantization_config"]["quant_method"] == "compressed-tensors"
    assert_holds(tmp_path / "b", layers)


def test_parts_quantized_in_different_ways(tmp_path: Path) -> None:
    make_directory(tmp_path, "gptq")
    edit_json(tmp_path / "config.json", moved("vision_config", "text_config"))
    edit_json(tmp_path / "config.json", lambda config: config["text_config"]["quantization_config"].update(bits=8))
    with pytest.raises(
        CheckpointError, match=r"vision_config\.quantization_config and text_config\.quantization_config"
    ):
        QuantDir(tmp_path)


def test_the_model_built_for_such_a_directory_keeps_none_of_its_settings(tmp_path: Path) -> None:
    model = awq_ext.quantize(float_model(), [BATCH], group_size=32, method="rtn", fold="always", progress=False)
    expected = logits(model)
    awq_ext.save_pretrained(model, tmp_path)
    edit_json(tmp_path / "config.json", moved("llm_config"))
    loaded = awq_ext.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    config = loaded.config.to_dict()
    assert (
        config.pop("quantization_config")["quant_method"] == "awq"
    )  # by which Transformers' own save_pretrained writes
    assert "quantization_config" not in str(config)
