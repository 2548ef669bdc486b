"""Mixtures of experts in directories of other tools: a layer for each projection of each expert, whatever the model has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from checks import Snapshot
from quantized_dirs import edit_tensors, make_directory, random_layer, without
from safetensors.torch import load_file, save_file
from tiny_transformers import (
    COUNT,
    EXPERT,
    FLOAT,
    GATE_UP,
    SETTINGS,
    SIZES,
    logits,
    made,
    quantized,
    qwen3,
    written_by_another_tool,
)
from torch import Tensor, nn

import awq_ext
from awq_ext import CheckpointError, QuantLinear
from awq_ext.checkpoints.formats import LAYOUTS, PackedLinear
from awq_ext.checkpoints.quantized_dir import QuantDir
from awq_ext.standins.expert_linears import ExpertLinears

transformers = pytest.importorskip("transformers", reason="from_pretrained builds models with it (extra hf)")
pytest.importorskip(
    "transformers.conversion_mapping", reason="this release of transformers has every expert as a module of its own"
)


@pytest.mark.parametrize("format", ["awq", "compressed-tensors", "native"])
@pytest.mark.parametrize(
    ("name", "experts", "leaves"),
    [
        ("Mixtral", "block_sparse_moe.experts", ("w1", "w2", "w3")),
        ("Qwen2-MoE", "mlp.experts", ("gate_proj", "down_proj", "up_proj")),
        ("Qwen3-MoE", "mlp.experts", ("gate_proj", "down_proj", "up_proj")),
        ("DeepSeek-V2", "mlp.experts", ("gate_proj", "down_proj", "up_proj")),
    ],
)
def test_files_have_the_names_of_public_checkpoints_and_give_the_same_logits(
    name: str, experts: str, leaves: tuple[str, ...], format: str, tmp_path: Path
) -> None:
    model, batch = quantized(name)
    expected = logits(model, batch)
    awq_ext.save_pretrained(model, tmp_path, format=format)
    layers = QuantDir(tmp_path).layers
    count = len(model.get_submodule(GATE_UP.format(1)))
    found = {layer for layer in layers if layer.startswith("model.layers.1.") and ".experts." in layer}
    assert found == {f"model.layers.1.{experts}.{e}.{leaf}" for e in range(count) for leaf in leaves}
    loaded = awq_ext.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), expected)
    assert isinstance(loaded.get_submodule(GATE_UP.format(1)), ExpertLinears)
    assert torch.equal(logits(awq_ext.load(made(name)[0], tmp_path), batch), expected)
    # a model whose experts are apart already
    assert torch.equal(logits(awq_ext.load(quantized(name, group_size=32)[0], tmp_path), batch), expected)


def test_shards_and_zero_points(tmp_path: Path) -> None:
    model, batch = quantized(symmetric=False, method="awq", n_grid=2, min_tokens=1)
    awq_ext.save_pretrained(model, tmp_path, max_shard_size=30_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path), batch), logits(model, batch))


def test_run_time_scales(tmp_path: Path) -> None:
    model, batch = quantized(fold="never", method="awq", n_grid=2, min_tokens=1)
    assert any(m.pre_quant_scale is not None for m in model.get_submodule(GATE_UP.format(0)).children())
    awq_ext.save_pretrained(model, tmp_path, format="native")
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path), batch), logits(model, batch))


@pytest.mark.parametrize("format", [name for name in LAYOUTS if name != "gguf"])  # a file of its own, without experts
def test_headers_tell_how_many_outputs_a_layer_has(format: str, tmp_path: Path) -> None:
    layers = make_directory(tmp_path, format)
    source = QuantDir(tmp_path)
    assert {name: source.rows(name) for name in source.layers} == {n: x.out_features for n, x in layers.items()}


def test_routers_and_other_float_linears_are_named_for_readers_that_take_every_linear_for_quantized(
    tmp_path: Path,
) -> None:
    model, batch = quantized(skip=(*FLOAT, "*layers.0.mlp.experts.down_proj.*", "*layers.1.*gate_up_proj.3"))
    awq_ext.save_pretrained(model, tmp_path)
    listed = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    expected = {"lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(2))}
    expected |= {f"model.layers.0.mlp.experts.{e}.down_proj" for e in range(COUNT)}
    expected |= {f"model.layers.1.mlp.experts.3.{leaf}" for leaf in ("gate_proj", "up_proj")}
    assert set(listed) == expected
    loaded = awq_ext.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert isinstance(loaded.get_parameter("model.layers.0.mlp.experts.down_proj"), nn.Parameter)
    kinds = [type(expert) for expert in loaded.get_submodule(GATE_UP.format(1)).children()]
    assert kinds == [nn.Linear if e == 3 else QuantLinear for e in range(COUNT)]


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE", "Qwen3-MoE"])
def test_float_experts_have_their_own_tensors_in_files(name: str, tmp_path: Path) -> None:
    model, batch = quantized(name, skip=(*FLOAT, "*experts*"))
    awq_ext.save_pretrained(model, tmp_path, max_shard_size=20_000)
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    last = "block_sparse_moe.experts.3.w2" if name == "Mixtral" else "mlp.experts.3.down_proj"
    assert f"model.layers.1.{last}.weight" in names
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path), batch), logits(model, batch))


def float_copy(folder: Path, layers: dict[str, PackedLinear], to: Path) -> nn.Module:
    """The checkpoint with float experts, as transformers itself reads it."""
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if n.rpartition(".")[0] not in layers}
    tensors |= {f"{name}.weight": layer.dequantize() for name, layer in layers.items()}
    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (to / "config.json").write_text(json.dumps(config))
    return transformers.AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32)


def test_a_file_of_another_tool_gives_every_expert_the_weights_that_transformers_gives_it(tmp_path: Path) -> None:
    layers = written_by_another_tool(tmp_path / "awq")
    model = awq_ext.from_pretrained(tmp_path / "awq")
    reference = float_copy(tmp_path / "awq", layers, tmp_path / "float")
    parameters = {n: p for n, p in reference.named_parameters() if ".experts." in n}
    assert len(parameters) == 2 * SIZES["num_hidden_layers"]
    for name, parameter in parameters.items():
        experts = list(model.get_submodule(name).children())
        assert len(experts) == COUNT
        for expert, weight in zip(experts, parameter, strict=True):
            assert isinstance(expert, QuantLinear)
            assert torch.equal(expert.weight, weight)
    for e in range(COUNT):
        fused = model.get_submodule(f"{GATE_UP.format(1)}.{e}")
        parts = [layers[f"model.layers.1.mlp.experts.{e}.{leaf}"] for leaf in ("gate_proj", "up_proj")]
        for attribute in ("qweight", "scales", "zeros"):
            assert torch.equal(getattr(fused, attribute), torch.cat([getattr(part, attribute) for part in parts]))
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-3, atol=1e-3)


def test_the_grouped_implementation_is_switched_off_for_these_experts_alone(tmp_path: Path) -> None:
    written_by_another_tool(tmp_path)
    model = qwen3()
    model.set_experts_implementation("grouped_mm")
    config = model.config
    awq_ext.load(model, tmp_path)
    assert model.config is config
    assert config._experts_implementation == "grouped_mm"
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "eager"
    assert torch.equal(logits(model), logits(awq_ext.from_pretrained(tmp_path)))


def replaced(name: str, layer: PackedLinear | Tensor) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        without(name)(tensors)
        packed = {"weight": layer} if isinstance(layer, Tensor) else LAYOUTS["awq"].pack(layer)
        tensors.update({f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in packed.items()})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(EXPERT), rf"lacks {EXPERT}\.\w+\.weight"),
        (without(f"{EXPERT}.up_proj"), rf"lacks {EXPERT}\.up_proj\.weight"),
        (without(f"{EXPERT}.down_proj"), rf"lacks {EXPERT}\.down_proj\.weight"),
        (without("model.layers.1.mlp.experts.11"), r"lacks model\.layers\.1\.mlp\.experts\.11\.\w+\.weight"),
        (without(*(f"model.layers.1.mlp.experts.{e}.up_proj" for e in range(COUNT))), "nothing is called .*up_proj"),
        (without("model.layers.1.mlp.experts"), r"lacks model\.layers\.1\.mlp\.experts\."),
        (replaced(f"{EXPERT}.up_proj", torch.randn(32, 64)), "is quantized, .* is not, and both are one layer"),
        (replaced(f"{EXPERT}.up_proj", random_layer(24, 64, 32)), r"cannot be converted .*size"),
        (replaced(f"{EXPERT}.up_proj", random_layer(32, 32, 32)), r"different input channels \(64, 32\)"),
        (replaced(f"{EXPERT}.up_proj", random_layer(32, 64, 16)), "do not fit the group size 32"),
        (replaced(f"{EXPERT}.up_proj", random_layer(32, 64, 32, bias=True)), "different biases"),
        (replaced(f"{EXPERT}.down_proj", torch.randn(64, 16)), "has shape"),
        (replaced(f"{EXPERT}.down_proj", torch.tensor(1.0)), "beside it have two dimensions"),
        (
            lambda t: [replaced(f"{EXPERT}.{p}_proj", torch.randn(32, k))(t) for p, k in (("gate", 64), ("up", 32))],
            "differ in input channels",
        ),
        (without("model.norm"), "lacks model.norm.weight"),
        (lambda t: t.pop(f"{EXPERT}.up_proj.qzeros"), "qzeros is missing"),
        (lambda t: t.update({f"{EXPERT}.up_proj.scales": torch.ones(2)}), "has no scales of two dimensions"),
    ],
)
def test_damaged_experts_are_refused_and_the_model_is_as_it_was(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    written_by_another_tool(tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        awq_ext.from_pretrained(tmp_path)
    model = qwen3()
    model.set_experts_implementation("grouped_mm")
    configs = {name: m.config for name, m in model.named_modules() if hasattr(m, "config")}
    before = Snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        awq_ext.load(model, tmp_path)
    before.assert_unchanged()
    assert all(model.get_submodule(name).config is config for name, config in configs.items())


@pytest.mark.parametrize(("count", "settings"), [(8, {}), (COUNT, {"moe_intermediate_size": 64})])
def test_another_model_s_experts_are_refused(count: int, settings: dict[str, int], tmp_path: Path) -> None:
    written_by_another_tool(tmp_path)
    model = qwen3(count, **settings)
    before = Snapshot(model)
    with pytest.raises(CheckpointError, match=r"features in the files|experts in the model"):
        awq_ext.load(model, tmp_path)
    before.assert_unchanged()


@pytest.mark.parametrize("at", [3, 70])
def test_an_interrupt_while_layers_are_placed_changes_nothing(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_by_another_tool(tmp_path)
    model = qwen3()
    before = Snapshot(model)
    calls = []
    real = QuantDir.layer

    def layer(self: QuantDir, name: str) -> PackedLinear:
        calls.append(name)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(QuantDir, "layer", layer)
        with pytest.raises(KeyboardInterrupt):
            awq_ext.load(model, tmp_path)
    before.assert_unchanged()
    del calls[:]
    monkeypatch.setattr(QuantDir, "layer", lambda self, name: calls.append(name) or real(self, name))
    awq_ext.load(model, tmp_path)
    assert len(calls) == len(set(calls)) == 3 * COUNT * SIZES["num_hidden_layers"]  # each read once


@pytest.mark.parametrize("name", ["gpt-oss", "Llama 4"])
def test_experts_that_files_have_in_one_tensor_stay_with_the_native_layout(name: str, tmp_path: Path) -> None:
    case = architectures.make(name)
    model = awq_ext.quantize(case.model, case.batches, **SETTINGS | {"skip": (*FLOAT, "*layers.1.*.down_proj.2")})
    expected = logits(model, case.batches[0])
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match=r'hold experts in a form.*format="native"'):
        awq_ext.save_pretrained(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    awq_ext.save_pretrained(model, tmp_path / "native", format="native")
    assert torch.equal(logits(awq_ext.from_pretrained(tmp_path / "native"), case.batches[0]), expected)
    awq_ext.save(model, tmp_path / "own")
    fresh = awq_ext.load(architectures.make(name, seed=1).model, tmp_path / "own")
    assert torch.equal(logits(fresh, case.batches[0]), expected)
    with pytest.raises(CheckpointError, match=r"load it and use awq_ext\.save_pretrained"):
        awq_ext.convert(tmp_path / "own", tmp_path / "converted")


def test_directories_of_experts_convert(tmp_path: Path) -> None:
    model, batch = quantized()
    awq_ext.save_pretrained(model, tmp_path / "awq")
    awq_ext.convert(tmp_path / "awq", tmp_path / "ct", format="compressed-tensors")
    awq_ext.convert(tmp_path / "ct", tmp_path / "back", format="awq")
    for folder in ("ct", "back"):
        assert QuantDir(tmp_path / folder).layers.keys() == QuantDir(tmp_path / "awq").layers.keys()
        assert torch.equal(logits(awq_ext.from_pretrained(tmp_path / folder), batch), logits(model, batch))


def test_transposed_layers_are_put_back_when_a_file_does_not_fit(tmp_path: Path) -> None:
    case = architectures.make("GPT-2")
    quantized_model = awq_ext.quantize(case.model, case.batches, **SETTINGS | {"fold": "always"})
    awq_ext.save_pretrained(quantized_model, tmp_path)
    expected = logits(quantized_model, case.batches[0])
    other = architectures.make("GPT-2", seed=1).model
    assert torch.equal(logits(awq_ext.load(other, tmp_path), case.batches[0]), expected)
    edit_tensors(tmp_path, without("transformer.ln_f"))
    model = architectures.make("GPT-2", seed=1).model
    before = Snapshot(model)
    with pytest.raises(CheckpointError, match=r"lacks transformer\.ln_f"):
        awq_ext.load(model, tmp_path)
    before.assert_unchanged()
