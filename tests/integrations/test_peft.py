"""LoRA adapters of PEFT over int4 layers: they learn, the layers stay frozen, and what was learned is saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checks import bits
from torch import nn

import awq_ext
from awq_ext import QuantLinear

peft = pytest.importorskip("peft", reason="needs peft: pip install 'awq-ext[test]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'awq-ext[test]'")
pytestmark = [
    # PEFT knows nn.Linear only, and says so before it takes the class that it was told to take
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def quantized() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    # a head of weights around 0.2: with the usual 0.02 no hidden state could make a token likely
    config = transformers.LlamaConfig(**sizes, **heads, initializer_range=0.2)
    model = transformers.LlamaForCausalLM(config).eval()
    batch = torch.randint(0, 64, (2, 12))
    return awq_ext.quantize(model, [batch], group_size=32, n_grid=2, progress=False)


def test_lora_learns_and_is_saved(tmp_path: Path) -> None:
    model = quantized()
    before = {name: bits(value) for name, value in model.state_dict().items()}
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    config._register_custom_module({QuantLinear: peft.tuners.lora.Linear})
    adapted = peft.get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 4  # two matrices, two blocks, four layers
    ids = torch.randint(0, 64, (2, 10))
    optimizer, losses = torch.optim.Adam(trained, lr=2e-2), []
    for _ in range(150):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        adapted.unload()
        assert {name: bits(value) for name, value in model.state_dict().items()} == before
        loaded = peft.PeftConfig.from_pretrained(tmp_path)
        loaded._register_custom_module({QuantLinear: peft.tuners.lora.Linear})
        again = peft.PeftModel.from_pretrained(quantized(), tmp_path, config=loaded)
        assert torch.equal(again(input_ids=ids).logits, expected)


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_and_unload, safe", "merge_adapter"])
def test_merging_is_refused(how: str) -> None:
    """There is no float weight to merge into: without an error the adapter would be gone."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    config._register_custom_module({QuantLinear: peft.tuners.lora.Linear})
    adapted = peft.get_peft_model(quantized(), config)
    ids = torch.randint(0, 64, (2, 10))
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        with pytest.raises(RuntimeError, match="keep an adapter beside the layer"):
            if how == "merge_adapter":
                adapted.merge_adapter()
            else:
                adapted.merge_and_unload(safe_merge="safe" in how)
        assert torch.equal(adapted(input_ids=ids).logits, before)
