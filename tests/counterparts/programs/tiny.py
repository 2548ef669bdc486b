"""Small random float models, made by the transformers of whichever environment this runs in."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def build(family: str, dtype: torch.dtype = torch.float16) -> PreTrainedModel:
    """A model of ``family`` with weights and biases of a trained one's size, some channels far above the others."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, architectures=[model_class.__name__])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.randn_like(parameter).mul(0.5).exp())
            else:
                parameter.normal_(0, 0.05 if parameter.dim() == 2 else 0.02)
    return model.to(dtype)


def save_float(family: str, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """The same as a Hugging Face directory."""
    build(family, dtype).save_pretrained(folder)


def samples(count: int = 8, tokens: int = 64) -> list[list[int]]:
    """Token ids to calibrate with."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SIZES["vocab_size"], (count, tokens), generator=generator).tolist()
