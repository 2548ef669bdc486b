"""Mixtures of experts through Transformers' own from_pretrained and save_pretrained: what awq_ext.from_pretrained gives."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_pretrained import BATCH, logits
from test_pretrained_experts import EXPERT, FLOAT, GATE_UP, quantized, rewrite, without, written_by_another_tool
from test_registration import assert_same_layers, load, registered  # noqa: F401
from torch import nn

import awq_ext
from awq_ext import CheckpointError, QuantLinear
from awq_ext.checkpoints.quantized_dir import QuantDir
from awq_ext.standins.expert_linears import ExpertLinears

transformers = pytest.importorskip("transformers", reason="Transformers NOT TESTED: pip install awq-ext[hf]")
pytest.importorskip(
    "transformers.conversion_mapping", reason="this release of transformers has every expert as a module of its own"
)

PARTLY_FLOAT = (*FLOAT, "*layers.0.mlp.experts.down_proj.*", "*layers.1.*gate_up_proj.3", "*layers.1.*down_proj.2")


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What Transformers' loader logs: it reports missing and unexpected tensors there."""
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    return caplog


def assert_loads_and_saves(folder: Path, model: nn.Module, batch: Any, log: pytest.LogCaptureFixture) -> Any:
    """Both loaders give the logits of ``model``, and what Transformers writes has the names it read."""
    expected = logits(model, batch)
    loaded = load(folder)
    assert torch.equal(logits(loaded, batch), expected)
    assert torch.equal(logits(awq_ext.from_pretrained(folder), batch), expected)
    assert_same_layers(model, loaded)
    again = folder.with_name("again")
    loaded.save_pretrained(again)
    assert {*load_file(again / "model.safetensors")} == {*load_file(folder / "model.safetensors")}
    for fresh in (load(again), awq_ext.from_pretrained(again)):
        assert torch.equal(logits(fresh, batch), expected)
    assert not [
        record for record in log.records if record.name.endswith("modeling_utils") and record.levelno > logging.INFO
    ]
    return loaded


@pytest.mark.parametrize("format", ["awq", "compressed-tensors", "modelopt", "native"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "DeepSeek-V2"])
def test_experts_of_public_checkpoints(name: str, format: str, tmp_path: Path, quiet: pytest.LogCaptureFixture) -> None:
    model, batch = quantized(name, symmetric=True)
    awq_ext.save_pretrained(model, tmp_path / "first", format=format)
    assert_loads_and_saves(tmp_path / "first", model, batch, quiet)


@pytest.mark.parametrize("name", ["gpt-oss", "Llama 4"])
def test_experts_that_files_have_in_one_tensor(name: str, tmp_path: Path, quiet: pytest.LogCaptureFixture) -> None:
    model, batch = quantized(name)
    awq_ext.save_pretrained(model, tmp_path / "first", format="native")
    loaded = assert_loads_and_saves(tmp_path / "first", model, batch, quiet)
    assert any(isinstance(module, ExpertLinears) for module in loaded.modules())


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_experts_some_of_which_are_float(name: str, tmp_path: Path, quiet: pytest.LogCaptureFixture) -> None:
    model, batch = quantized(name, skip=PARTLY_FLOAT)
    awq_ext.save_pretrained(model, tmp_path / "first", max_shard_size=30_000)
    loaded = load(tmp_path / "first")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    experts = list(loaded.get_submodule(GATE_UP.format(1)).children())
    assert [e for e, expert in enumerate(experts) if not isinstance(expert, QuantLinear)] == [3]
    assert isinstance(loaded.get_parameter("model.layers.0.mlp.experts.down_proj"), nn.Parameter)
    assert QuantDir(tmp_path / "first").layers.keys()
    awq_ext.save_pretrained(loaded, tmp_path / "one")
    assert_loads_and_saves(tmp_path / "one", model, batch, quiet)


def test_files_of_another_tool(tmp_path: Path, quiet: pytest.LogCaptureFixture) -> None:
    written_by_another_tool(tmp_path / "first")
    model = awq_ext.from_pretrained(tmp_path / "first")
    loaded = assert_loads_and_saves(tmp_path / "first", model, BATCH, quiet)
    for layer in loaded.model.layers:
        assert layer.mlp.experts.config._experts_implementation == "eager"
    assert loaded.config._experts_implementation != "eager"


def test_run_time_scales_and_other_dtypes(tmp_path: Path) -> None:
    model, batch = quantized(fold="never", method="awq", n_grid=2, min_tokens=1, symmetric=False)
    folder = awq_ext.save_pretrained(model, tmp_path / "first", format="native")
    assert torch.equal(logits(load(folder), batch), logits(model, batch))
    half = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert_same_layers(model, half)
    assert torch.equal(logits(half, batch), logits(awq_ext.from_pretrained(folder, dtype=torch.bfloat16), batch))


def test_dequantized_experts_are_one_parameter_again(tmp_path: Path) -> None:
    model, batch = quantized("Mixtral", skip=PARTLY_FLOAT)
    loaded = load(awq_ext.save_pretrained(model, tmp_path / "first"))
    before = logits(loaded, batch)
    loaded.dequantize()
    assert not any(isinstance(module, (QuantLinear, ExpertLinears)) for module in loaded.modules())
    torch.testing.assert_close(logits(loaded, batch), before, rtol=1e-4, atol=1e-4)  # same sums in another order
    loaded.save_pretrained(tmp_path / "float")
    assert torch.equal(logits(load(tmp_path / "float"), batch), logits(loaded, batch))


def test_missing_experts_are_an_error(tmp_path: Path) -> None:
    written_by_another_tool(tmp_path)
    rewrite(tmp_path, without(f"{EXPERT}.up_proj"))
    config = (tmp_path / "config.json").read_text()
    with pytest.raises(CheckpointError, match=rf"lacks {EXPERT}\.up_proj\.weight"):
        load(tmp_path)
    written_by_another_tool(tmp_path, count=8)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.\d\.mlp\.experts\.8"):
        load(tmp_path)


def test_layers_with_a_transposed_weight(tmp_path: Path, quiet: pytest.LogCaptureFixture) -> None:
    model, batch = quantized("GPT-2")
    folder = awq_ext.save_pretrained(model, tmp_path / "first")
    assert_loads_and_saves(folder, model, batch, quiet)


def test_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map NOT TESTED: pip install accelerate")
    model, batch = quantized("Mixtral")
    folder = awq_ext.save_pretrained(model, tmp_path / "first")
    assert torch.equal(logits(load(folder, device_map="cpu"), batch), logits(model, batch))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    settings = {"device_map": places, "offload_folder": tmp_path / "offload"}
    assert torch.equal(logits(load(folder, **settings), batch), logits(model, batch))
    with pytest.raises(CheckpointError, match="cannot be kept on disk"):
        load(folder, **settings, offload_buffers=True)
