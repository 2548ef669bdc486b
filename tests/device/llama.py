"""A Llama with random weights, in the sizes of Llama-3.2-1B's blocks."""

from __future__ import annotations

import gpu as device
import torch
from torch import nn


def llama(gpu: device.Gpu, blocks: int, vocabulary: int) -> nn.Module:
    """The model on the device, in bf16; on the emulated GPU it is tiny, with a vocabulary of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = (2048, 8192, 32, 8, vocabulary) if gpu.real else (128, 128, 2, 1, 32)
    hidden, inner, heads, pairs, vocabulary = sizes
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    with torch.device(gpu.device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()
