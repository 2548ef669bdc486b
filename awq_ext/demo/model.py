"""A byte-level Llama in plain PyTorch, small enough to ship with the package and real enough to quantize.

The module names are those of Llama (``q_proj`` ... ``down_proj``, ``lm_head``), so what the demo shows is what happens
in a large model: norms feed several Linears that share an input, ``v_proj`` feeds ``o_proj`` through attention, and
``up_proj`` feeds ``down_proj`` through the gate. Shapes: B = batch, S = sequence, H = hidden, D = head_dim.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name("weights.safetensors")  # made by tests/benchmarks/train_demo_model.py
VOCABULARY = 256  # one token a byte: no tokenizer to download or explain


@dataclass(frozen=True)
class ByteLlamaConfig:
    """Sizes of the model; the defaults are those of the shipped weights."""

    hidden: int = 192
    intermediate: int = 512
    blocks: int = 3
    query_heads: int = 6
    kv_heads: int = 3
    context: int = 256  # bytes the model was trained on at a time
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.query_heads


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def rotary_tables(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary position embedding: two of fp32 [S, D]."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angle = torch.outer(torch.arange(length, device=device).float(), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + D/2) of x [B, heads, S, D] by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention in which ``query_heads / kv_heads`` query heads share one key and value head."""

    def __init__(self, config: ByteLlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_features = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.k_proj = nn.Linear(config.hidden, kv_features, bias=False)
        self.v_proj = nn.Linear(config.hidden, kv_features, bias=False)
        self.o_proj = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        batch, length, hidden = x.shape
        split = lambda y: y.view(batch, length, -1, self.head_dim).transpose(1, 2)  # noqa: E731
        query = rotate(split(self.q_proj(x)), cos, sin)
        key = rotate(split(self.k_proj(x)), cos, sin)
        value = split(self.v_proj(x))
        # written out rather than enable_gqa=True, which older torch has only for some backends
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, hidden))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ByteLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ByteLlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class ByteLlama(nn.Module):
    """Decoder-only language model over bytes."""

    def __init__(self, config: ByteLlamaConfig | None = None) -> None:
        super().__init__()
        self.config = config or ByteLlamaConfig()
        self.embed_tokens = nn.Embedding(VOCABULARY, self.config.hidden)
        self.layers = nn.ModuleList(Block(self.config) for _ in range(self.config.blocks))
        self.norm = RMSNorm(self.config.hidden, self.config.norm_eps)
        self.lm_head = nn.Linear(self.config.hidden, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Bytes int64 [B, S] -> logits [B, S, 256] of the byte that follows each position."""
        x = self.embed_tokens(input_ids)
        cos, sin = rotary_tables(input_ids.shape[1], self.config.head_dim, self.config.rope_base, input_ids.device)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))

    @torch.no_grad()
    def generate(self, prompt: bytes, new_bytes: int = 80, temperature: float = 0.0, seed: int = 0) -> bytes:
        """The bytes that follow ``prompt``: greedy at temperature 0, else sampled from a fixed seed.

        Recomputes the whole prefix for every byte: a cache would be faster and would hide the model behind bookkeeping.
        """
        ids = torch.tensor([list(prompt)], device=self.embed_tokens.weight.device)
        generator = torch.Generator(ids.device).manual_seed(seed)
        for _ in range(new_bytes):
            logits = self(ids[:, -self.config.context :])[:, -1].float()
            if temperature > 0:
                following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                following = logits.argmax(-1, keepdim=True)
            ids = torch.cat((ids, following), dim=1)
        return bytes(ids[0, len(prompt) :].tolist())


def load_demo_model(dtype: torch.dtype = torch.bfloat16, path: Path = WEIGHTS) -> ByteLlama:
    """The trained model that ships with the package, in evaluation mode."""
    with safe_open(path, framework="pt") as file:
        config = ByteLlamaConfig(**json.loads(file.metadata()["config"]))
    model = ByteLlama(config)
    model.load_state_dict(load_file(path))
    return model.to(dtype).eval()
