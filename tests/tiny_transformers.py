"""Tiny models of transformers, float and quantized, and directories of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import architectures
import models
import pytest
import torch
from checks import same_bits
from quantized_dirs import random_layer
from safetensors.torch import save_file
from torch import Tensor, nn

import awq_ext
from awq_ext.checkpoints.formats import LAYOUTS, Facts, PackedLinear, Summary

transformers = pytest.importorskip("transformers", reason="Transformers NOT TESTED: pip install 'awq-ext[hf]'")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 50_000.0,
}

BATCH = torch.arange(2, 34).view(2, 16)


def float_model(family: str = "Llama", dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**SIZES | settings)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as transformers does; .to(dtype) would round the rotary tables
    try:
        return architectures.loud(getattr(transformers, f"{family}ForCausalLM")(config))
    finally:
        torch.set_default_dtype(before)


def logits(model: nn.Module, batch: Any = BATCH) -> Tensor:
    with torch.no_grad():
        return models.logits(model(**batch) if isinstance(batch, dict) else model(batch))


SETTINGS = {"group_size": 16, "method": "rtn", "fold": "always", "progress": False}

# what people leave float in these models, and what the awq layout cannot hold at these sizes
FLOAT = (r"re:(.*\.)?(lm_head|shared_expert_gate|q_b_proj|kv_a_proj_with_mqa)",)

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

COUNT = 12  # expert 10 comes before expert 2 where names are sorted as texts

GATE_UP = "model.layers.{}.mlp.experts.gate_up_proj"


def qwen3(count: int = COUNT, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return float_model("Qwen3Moe", num_experts=count, head_dim=16, **MOE | settings)


def made(name: str) -> tuple[nn.Module, Any]:
    """A float model and a batch."""
    if name == "Qwen3-MoE":
        return qwen3(), BATCH
    case = architectures.make(name)
    return case.model, case.batches[0]


def quantized(name: str = "Qwen3-MoE", **options: Any) -> tuple[nn.Module, Any]:
    model, batch = made(name)
    return awq_ext.quantize(model, [batch], **SETTINGS | {"skip": FLOAT} | options), batch


def written_by_another_tool(folder: Path, count: int = COUNT, group_size: int = 32) -> dict[str, PackedLinear]:
    """A Qwen3-MoE in AutoAWQ's layout with random experts; returns the layers."""
    model = qwen3(count)
    hidden, inner = SIZES["hidden_size"], MOE["moe_intermediate_size"]
    layers = {}
    for i in range(SIZES["num_hidden_layers"]):
        for e in range(count):
            place = f"model.layers.{i}.mlp.experts.{e}"
            layers |= {f"{place}.{leaf}": random_layer(inner, hidden, group_size) for leaf in ("gate_proj", "up_proj")}
            layers[f"{place}.down_proj"] = random_layer(hidden, inner, group_size)
    summary = Summary({name: Facts.of(layer) for name, layer in layers.items()}, ["gate", "lm_head", "self_attn"])
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".experts." not in name}
    for name, layer in layers.items():
        tensors |= {f"{name}.{leaf}": t.contiguous() for leaf, t in LAYOUTS["awq"].pack(layer).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]}
    config["quantization_config"] = LAYOUTS["awq"].quantization_config(summary)
    (folder / "config.json").write_text(json.dumps(config))
    return layers


EXPERT = "model.layers.1.mlp.experts.3"


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """All methods; afterwards Transformers is what it was."""
    from transformers.quantizers import auto

    tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    before = [dict(table) for table in tables]
    awq_ext.register_with_transformers(awq_ext.integrations.registration.METHODS)
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def assert_same_layers(a: Any, b: Any) -> None:
    ours, theirs = ({n: m for n, m in x.named_modules() if isinstance(m, awq_ext.QuantLinear)} for x in (a, b))
    assert ours.keys() == theirs.keys() and ours
    for name, layer in ours.items():
        for leaf in ("qweight", "scales", "zeros"):
            assert same_bits(getattr(layer, leaf), getattr(theirs[name], leaf)), f"{name}.{leaf}"


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
