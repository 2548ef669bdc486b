"""A tiny Hugging Face directory: a random Llama and a byte tokenizer, made in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def make(directory: Path, dtype: str = "float32", vocab_size: int = 260) -> Path:
    """Write the model and its tokenizer to ``directory``; skips the test where transformers is missing."""
    transformers = pytest.importorskip("transformers", reason="pip install 'awq-ext[hf]'")
    import torch

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:  # gains that differ, as in trained models: something for AWQ to find
                parameter.mul_(torch.randn_like(parameter).mul(0.8).exp())
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def tokenizer() -> Any:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<end>", *letters])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return fast
