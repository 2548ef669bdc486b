"""LoRA adapters of PEFT over int4 layers: they learn, the layers stay frozen, and what was learned is saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import bits
from torch import nn

import awq_ext
from awq_ext import QuantLinear

peft = pytest.importorskip("peft", reason="needs peft: pip install 'awq-ext[test]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'awq-ext[test]'")
pytestmark = [
    pytest.mark.filterwarnings("error:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
NAMES = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """PEFT as after awq_ext.register_with_peft(); afterwards as it was."""
    before = dict(peft.PEFT_TYPE_TO_TUNER_MAPPING)
    awq_ext.register_with_peft()
    awq_ext.register_with_peft()  # once more changes nothing
    yield
    peft.PEFT_TYPE_TO_TUNER_MAPPING.update(before)


def quantized(kind: str = "LlamaForCausalLM", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    # a head of weights around 0.2: with the usual 0.02 no hidden state could make a token likely
    config = transformers.LlamaConfig(**sizes, **heads, initializer_range=0.2)
    model = getattr(transformers, kind)(config).eval()
    batch = torch.randint(1, 64, (2, 12))
    return awq_ext.quantize(model, [batch], group_size=32, n_grid=2, progress=False, **options)


def trained(adapted: nn.Module, ids: torch.Tensor, steps: int = 150) -> list[float]:
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(parameters, lr=2e-2), []
    for _ in range(steps):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adapters(model: nn.Module) -> set[str]:
    found = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    return {name.removeprefix("base_model.model.") for name in found}


@pytest.mark.parametrize(
    ("targets", "options"), [(NAMES, {}), ("all-linear", {}), ("all-linear", {"per_layer": {"*.v_proj": {"bits": 8}}})]
)
def test_lora_learns_and_is_saved(targets: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = quantized(**options)
    before = {name: bits(value) for name, value in model.state_dict().items()}
    layers = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    expected = layers if targets == "all-linear" else {name for name in layers if name.endswith(tuple(NAMES))}
    assert adapters(adapted) == expected
    assert sum(p.requires_grad for p in adapted.parameters()) == 2 * len(expected)
    ids = torch.randint(0, 64, (2, 10))
    losses = trained(adapted, ids)
    assert losses[-1] < losses[0] / 3
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
        adapted.unload()
        assert {name: bits(value) for name, value in model.state_dict().items()} == before
        again = peft.PeftModel.from_pretrained(quantized(**options), tmp_path)
        assert torch.equal(again(input_ids=ids).logits, logits)


def test_a_second_adapter_and_float_layers() -> None:
    model = quantized(skip=("*lm_head", "*layers.1.*"))
    linears = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, QuantLinear))}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert adapters(adapted) == linears - {"lm_head"}
    adapted.add_adapter("second", peft.LoraConfig(r=4, target_modules="all-linear"))
    assert adapters(adapted) == linears - {"lm_head"}
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer.get_base_layer(), QuantLinear) and set(layer.lora_A) == {"default", "second"}


def test_an_output_layer_of_ints_is_left_by_all_linear_and_can_be_named() -> None:
    ids = torch.arange(8)[None]
    model = quantized(head="int8")
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert "lm_head" not in adapters(adapted) and isinstance(model.lm_head, QuantLinear)
    model = adapted.unload()
    named = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    assert adapters(named) == {"lm_head"}
    with torch.no_grad():
        assert torch.equal(named(input_ids=ids).logits, wanted)  # a new adapter adds nothing


def test_a_classifier_keeps_its_head() -> None:
    model = quantized("LlamaForSequenceClassification", skip=("score",))
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    assert not any(name.startswith("score") for name in adapters(adapted)) and len(adapters(adapted)) == 14


def test_float_models_are_pefts_own_business() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=32)
    model = transformers.LlamaForCausalLM(config)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    kinds = {type(module) for module in adapted.modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert kinds == {peft.tuners.lora.Linear}
    adapted.merge_and_unload()


def test_transformers_own_way_to_add_an_adapter(tmp_path: Path) -> None:
    model = quantized()
    model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids = torch.randint(0, 64, (2, 10))
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    assert not (tmp_path / "model.safetensors").exists()
    other = quantized()
    other.load_adapter(str(tmp_path))
    assert torch.equal(other(input_ids=ids).logits, expected)


def test_the_trainer_trains_and_saves_adapters(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer was NOT TESTED: pip install accelerate")
    adapted = peft.get_peft_model(quantized(), peft.LoraConfig(r=4, target_modules="all-linear"))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(1, 64, (8, 10))]
    arguments = transformers.TrainingArguments(str(tmp_path / "runs"), max_steps=2, report_to=[], use_cpu=True)
    trainer = transformers.Trainer(adapted, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "x"))
    ids = rows[0]["input_ids"][None]
    again = peft.PeftModel.from_pretrained(quantized(), tmp_path / "x").eval()
    assert torch.equal(again(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_and_unload, safe", "merge_adapter"])
def test_merging_is_refused(how: str) -> None:
    """There is no float weight to merge into: without an error the adapter would be gone."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(quantized(), config)
    ids = torch.randint(0, 64, (2, 10))
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        with pytest.raises(RuntimeError, match=r"keep an adapter beside the layer(.|\n)*merge it into the float model"):
            if how == "merge_adapter":
                adapted.merge_adapter()
            else:
                adapted.merge_and_unload(safe_merge="safe" in how)
        assert torch.equal(adapted(input_ids=ids).logits, before)
