"""What people do with a quantized Transformers model without reading our documentation: Transformers' own ways to save it."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from checks import Snapshot, same_bits
from tiny_transformers import BATCH, assert_same_layers, float_model, load, logits, registered  # noqa: F401
from torch import nn

import awq_ext
from awq_ext import CheckpointError, QuantLinear
from awq_ext.reporting.model_card import MARK

transformers = pytest.importorskip("transformers", reason="Transformers NOT TESTED: pip install awq-ext[hf]")


def quantized(**options: Any) -> Any:
    chosen = {"group_size": 32, "n_grid": 2, "fold": "always", "progress": False} | options
    return awq_ext.quantize(float_model(), [BATCH], **chosen)


def by_trainer(model: Any, folder: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer was NOT TESTED: pip install accelerate")
    arguments = transformers.TrainingArguments(str(folder.with_name("runs")), report_to=[], use_cpu=True)
    transformers.Trainer(model, arguments).save_model(str(folder))


def by_push(model: Any, folder: Path) -> None:
    """What ``push_to_hub`` does before it uploads."""
    model.save_pretrained(str(folder), max_shard_size="20KB")


def by_copy(model: Any, folder: Path) -> None:
    twin = copy.deepcopy(model)
    norm = model.model.norm.weight
    model.model.norm.weight = nn.Parameter(torch.zeros_like(norm))  # the copy must not save the original
    twin.save_pretrained(folder)
    model.model.norm.weight = norm


def by_pickle(model: Any, folder: Path) -> None:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.load(file, weights_only=False).save_pretrained(folder)


def assert_equal(model: Any, folder: Path) -> None:
    expected = logits(model)
    for loaded in (awq_ext.from_pretrained(folder), load(folder)):
        assert_same_layers(model, loaded)
        assert torch.equal(logits(loaded), expected)
        assert loaded.awq_report == model.awq_report


@pytest.mark.parametrize(
    "save", [lambda model, folder: model.save_pretrained(folder), by_trainer, by_push, by_copy, by_pickle]
)
def test_a_whole_checkpoint_is_saved(save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    model = quantized()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(model, tmp_path / "x")
    assert_equal(model, tmp_path / "x")
    after = model.state_dict()
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["group_size"]) == ("awq", 32)


@pytest.mark.parametrize("format", ["compressed-tensors", "native", "modelopt"])
@pytest.mark.parametrize("how", ["from_pretrained", "load", "auto"])
def test_a_loaded_model_is_saved_in_the_format_it_came_in(format: str, how: str, tmp_path: Path) -> None:
    model = quantized(symmetric=True)
    folder = awq_ext.save_pretrained(model, tmp_path / "x", format=format)
    ways = {"from_pretrained": awq_ext.from_pretrained, "load": lambda f: awq_ext.load(float_model, f), "auto": load}
    ways[how](folder).save_pretrained(tmp_path / "again")
    assert_equal(model, tmp_path / "again")
    first, second = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert first["quantization_config"] == second["quantization_config"]
    assert (folder / "hf_quant_config.json").exists() == (tmp_path / "again" / "hf_quant_config.json").exists()


def test_parts_of_a_model_are_saved_too(tmp_path: Path) -> None:
    model = quantized()
    model.model.save_pretrained(tmp_path / "x")
    loaded = awq_ext.from_pretrained(tmp_path / "x")
    with torch.no_grad():
        assert torch.equal(loaded(BATCH).last_hidden_state, model.model(BATCH).last_hidden_state)
    inner = float_model()
    awq_ext.quantize(nn.Sequential(inner), [BATCH], group_size=32, n_grid=2, fold="always", progress=False)
    inner.save_pretrained(tmp_path / "y")
    assert torch.equal(logits(load(tmp_path / "y")), logits(inner))


def test_what_the_format_cannot_hold_is_an_error_that_names_the_call_which_can(tmp_path: Path) -> None:
    model = quantized(fold="never")
    before = Snapshot(model)
    with pytest.raises(CheckpointError, match=r'scaled at run time(.|\n)*save_pretrained\(.*format="native"\)'):
        model.save_pretrained(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    before.assert_unchanged()
    mixed = quantized(per_layer={"*layers.0.*": {"group_size": 16}})
    with pytest.raises(CheckpointError, match='format="compressed-tensors"'):
        mixed.save_pretrained(tmp_path / "x")
    awq_ext.save_pretrained(model, tmp_path / "native", format="native")
    assert_equal(model, tmp_path / "native")


def test_experts_of_which_no_file_tells(tmp_path: Path) -> None:
    if not hasattr(transformers, "GptOssForCausalLM"):
        pytest.skip("this release of transformers has no gpt-oss")
    case = architectures.make("gpt-oss")
    model = awq_ext.quantize(case.model, case.batches, group_size=16, method="rtn", progress=False)
    with pytest.raises(CheckpointError, match=r'save_pretrained\(.*format="native"\)'):
        model.save_pretrained(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_quantization_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = float_model()
    before = Snapshot(model)

    def broken(*arguments: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("awq_ext.pipeline.quantize.announce", broken)
    with pytest.raises(RuntimeError, match="broken"):
        awq_ext.quantize(model, [BATCH], group_size=32, method="rtn", progress=False)
    before.assert_unchanged()
    assert not hasattr(model.config, "quantization_config") and getattr(model, "hf_quantizer", None) is None


def test_fake_quantized_and_dequantized_models_are_ordinary_ones(tmp_path: Path) -> None:
    fake = quantized(packed=False, bits=3)
    fake.save_pretrained(tmp_path / "fake")
    assert torch.equal(logits(load(tmp_path / "fake")), logits(fake))
    model = quantized()
    expected = logits(model)
    model.dequantize()
    model.save_pretrained(tmp_path / "float")
    loaded = load(tmp_path / "float")
    assert not any(isinstance(module, QuantLinear) for module in loaded.modules())
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


def test_adapters_are_saved_alone(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="PEFT NOT TESTED: pip install peft")
    model = awq_ext.from_pretrained(awq_ext.save_pretrained(quantized(), tmp_path / "x"))
    model._hf_peft_config_loaded = True  # as model.add_adapter does, of whose rest the quantizer must stay clear
    assert model.hf_quantizer.get_state_dict_and_metadata(model) == (None, {})


def test_casts_work(tmp_path: Path) -> None:
    model = quantized().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "x")
    loaded = awq_ext.from_pretrained(tmp_path / "x")
    assert_same_layers(model, loaded)  # logits differ: the cast rounds the rotary tables, which no file has
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert model.float().dtype == torch.float32


@pytest.mark.parametrize("name", ["Llama", "Qwen2-MoE", "gpt-oss"])
@pytest.mark.parametrize("save", [awq_ext.save, lambda model, folder: awq_ext.save_pretrained(model, folder, "native")])
def test_native_directories_fail_loudly_in_transformers_that_does_not_know_them(
    name: str, save: Callable[[Any, Path], Any], unregistered: None, tmp_path: Path
) -> None:
    """It warns of an unknown quantization type, and would go on with random weights."""
    case = architectures.make(name)
    save(awq_ext.quantize(case.model, case.batches, group_size=16, method="rtn", progress=False), tmp_path)
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModel, type(case.model)):
        with pytest.raises(RuntimeError, match="mismatch"):
            kind.from_pretrained(tmp_path)
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path), case.batches[0]), logits(case.model, case.batches[0]))


@pytest.fixture
def unregistered(registered: None) -> None:  # noqa: F811
    """Transformers as it is without this package; what was registered comes back with the fixture that this one asks for."""
    from transformers.quantizers import auto

    for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        table.pop("awq_ext")


def test_the_model_card(tmp_path: Path) -> None:
    model = quantized()
    model.config._name_or_path = "some-org/Some-Model"
    model.save_pretrained(tmp_path / "x")
    text = (tmp_path / "x" / "README.md").read_text()
    for words in (
        "base_model: some-org/Some-Model",
        "| method | awq |",
        "4 bits, groups of 32",
        "calibrated on | 32 tokens",
        "of plain rounding's",
        f"awq_ext {awq_ext.__version__}",
        "fold='always'",
        "group_size=32",
        "vllm serve",
        "awq_ext.from_pretrained",
    ):
        assert words in text, words
    awq_ext.convert(tmp_path / "x", tmp_path / "y", format="native")
    other = (tmp_path / "y" / "README.md").read_text()
    assert "format `native`" in other and "some-org/Some-Model" in other and "vllm" not in other


@pytest.mark.parametrize(
    "save",
    [
        lambda model, folder: model.save_pretrained(folder),
        lambda model, folder: awq_ext.save_pretrained(model, folder, overwrite=True),
    ],
)
def test_a_card_that_a_person_wrote_stays(save: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    model = quantized()
    save(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    awq_ext.convert(tmp_path, tmp_path / "y", format="native")
    assert (tmp_path / "y" / "README.md").read_text() == "mine"
    (tmp_path / "README.md").unlink()
    for size in ("32", "64"):  # one of ours is written anew
        save(quantized(group_size=int(size)), tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert MARK in text and f"groups of {size}" in text


def test_float_weights_are_not_replaced(tmp_path: Path) -> None:
    float_model().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = quantized()
    with pytest.raises(FileExistsError, match="float weights"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    model.save_pretrained(tmp_path, overwrite=tmp_path)
    assert_equal(model, tmp_path)
    model.save_pretrained(tmp_path)  # quantized ones are, as by Transformers
    with pytest.raises(FileExistsError, match="quantized checkpoint"):
        model.save_pretrained(tmp_path, overwrite=False)
    source = load_float(tmp_path / "source")
    awq_ext.quantize(source, [BATCH], group_size=32, method="rtn", progress=False)
    with pytest.raises(FileExistsError, match="made from"):
        source.save_pretrained(tmp_path / "source", overwrite=tmp_path / "source")


def load_float(folder: Path) -> Any:
    float_model().save_pretrained(folder)
    return load(folder)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("before", ["modelopt", "native", "shards", "settings of AutoGPTQ", "version 1"])
def test_nothing_is_left_of_a_checkpoint_in_another_layout(before: str, tmp_path: Path) -> None:
    target, model = tmp_path / "x", quantized()
    if before == "shards":
        model.save_pretrained(target, max_shard_size="20KB")
        assert len(list(target.glob("*.safetensors"))) > 1
    else:
        old = quantized(symmetric=True)
        awq_ext.save_pretrained(old, target, format=before if before in ("modelopt", "native") else "gptq")
    files = {"settings of AutoGPTQ": "quantize_config.json", "version 1": "awq_ext.json"}
    if before in files:
        (target / files[before]).write_text("{}")
    (target / "notes.txt").write_text("mine")
    (target / "adapter_model.safetensors").write_text("mine")
    del model.awq_report  # a model without one takes over none
    model.save_pretrained(tmp_path / "empty")
    model.save_pretrained(target)
    assert names(target) == names(tmp_path / "empty") | {"notes.txt", "adapter_model.safetensors"}
    for loaded in (awq_ext.from_pretrained(target), load(target)):
        assert torch.equal(logits(loaded), logits(model)) and not hasattr(loaded, "awq_report")
    model.save_pretrained(target, max_shard_size="20KB")
    assert "model.safetensors" not in names(target)
    assert torch.equal(logits(load(target)), logits(model))


def test_a_save_that_fails_leaves_the_checkpoint_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized().save_pretrained(tmp_path, max_shard_size="20KB")
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def full(tensors: Any, file: str, metadata: Any = None) -> None:
        Path(file).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="disk full"):
        quantized(group_size=64).save_pretrained(tmp_path)
    # what lies beside a checkpoint may be new already
    after = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} | {"README.md": before["README.md"]}
    assert after == before
