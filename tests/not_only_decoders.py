"""Small random models: encoders of text, a decoder that embeds, a reranker, and two that see pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import loud
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import awq_ext

transformers = pytest.importorskip("transformers", reason="Transformers NOT TESTED: pip install 'awq-ext[hf]'")

Batch = dict[str, Tensor]
BYTES, IMAGE = 256, 256  # tokens that are bytes; the token that stands for a patch
SIZES = {
    "vocab_size": 264,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,  # of 32 channels, the least that vLLM's CPU backend takes
    "max_position_embeddings": 64,
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
PATCHES = 16  # of a picture of 32 x 32
TOWER = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
TOWER |= {"image_size": 32, "patch_size": 8}


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def modernbert() -> nn.Module:
    return transformers.ModernBertModel(transformers.ModernBertConfig(**SIZES | ENDS))


def reranker() -> nn.Module:
    """One score for a text and what is asked of it, joined."""
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=1))


def qwen3_embedding() -> nn.Module:
    """As Qwen3-Embedding: a decoder without its head, the last token's state is the embedding."""
    return transformers.Qwen3Model(transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32))


def llava() -> nn.Module:
    seeing = transformers.CLIPVisionConfig(**TOWER, num_hidden_layers=3, projection_dim=64)
    config = transformers.LlavaConfig(
        vision_config=seeing,
        text_config=transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
        image_token_id=IMAGE,
        image_seq_length=PATCHES,
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config)


def idefics3() -> nn.Module:
    """As SmolVLM: four patches become one token."""
    config = transformers.Idefics3Config(
        vision_config=TOWER | {"num_hidden_layers": 2},
        text_config=transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
        scale_factor=2,
        image_token_id=IMAGE,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def as_published(model: nn.Module, folder: Path) -> nn.Module:
    """A LLaVA from files that call its tower what those of the hub do; Transformers 5 drops a word where a model is new."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    named = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    return type(model).from_pretrained(folder).eval()


TEXT: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "modernbert": modernbert,
    "reranker": reranker,
    "qwen3_embedding": qwen3_embedding,
}


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return loud(build()).eval()


def text_batches(count: int = 4, rows: int = 4) -> list[Batch]:
    """Tokens 3 to 255, no special one, of 16 each and nothing padded."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, BYTES, (rows, 16), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens]


def picture_batches(count: int = 4) -> list[Batch]:
    """Two texts with a picture each, as a processor makes them: as many image tokens as there are patches, and the pixels."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        words = torch.randint(3, BYTES, (2, 8), generator=generator)
        ids = torch.cat([words[:, :2], torch.full((2, PATCHES), IMAGE), words[:, 2:]], 1)
        pixels = torch.randn(2, 3, 32, 32, generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
    return found


@torch.no_grad()
def output(model: nn.Module, batch: Batch) -> Tensor:
    """Logits, or the last hidden states."""
    found = model(**batch)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def mean_pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The embedding [B, H] of states [B, T, H]: their mean over what is no padding."""
    weights = mask.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1)


def quantized(model: nn.Module, batches: list[Batch], **settings: Any) -> nn.Module:
    """The same in int4, in a form that every format holds."""
    chosen = {"group_size": 32, "fold": "always", "symmetric": True, "progress": False} | settings
    return awq_ext.quantize(model, batches, **chosen)


def int4_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, awq_ext.QuantLinear)}


def saved(model: nn.Module, folder: Path, format: str) -> Path:
    return awq_ext.save_pretrained(model, folder / format, format=format)
