"""Tiny models of three blocks, one for each way in which a model can surprise the pipeline, and the batches that fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# No multiples of a weight group, so every row ends in a short one.
VOCAB, HIDDEN, INNER, HEADS, KV_HEADS = 50, 40, 72, 4, 2


class Norm(nn.Module):
    """RMSNorm; ``offset`` stores w - 1, as Gemma does. Gains differ widely between channels, as in trained models."""

    def __init__(self, width: int = HIDDEN, offset: bool = False) -> None:
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.randn(width).mul(0.8).exp() - int(offset))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.weight + 1 if self.offset else self.weight
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * gain


class Attention(nn.Module):
    """Causal, with fewer key/value heads than query heads."""

    def __init__(self) -> None:
        super().__init__()
        head = HIDDEN // HEADS
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * head, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * head, bias=False)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor, count: int) -> Tensor:
            return y.unflatten(-1, (count, -1)).transpose(1, 2)

        q, k, v = heads(self.q_proj(x), HEADS), heads(self.k_proj(x), KV_HEADS), heads(self.v_proj(x), KV_HEADS)
        k, v = k.repeat_interleave(HEADS // KV_HEADS, 1), v.repeat_interleave(HEADS // KV_HEADS, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module] = Norm) -> None:
        super().__init__()
        self.input_norm = norm()
        self.attention = Attention()
        self.post_norm = norm()
        self.mlp = Gated()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x))
        return x + self.mlp(self.post_norm(x))


class MlpBlock(nn.Module):
    """norm -> up -> GELU -> down -> residual; the variants override ``forward``."""

    def __init__(self, norm: Callable[[], nn.Module] = Norm) -> None:
        super().__init__()
        self.norm = norm()
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class TwiceBlock(MlpBlock):
    """Calls one and the same Linears two times a forward."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.down(F.gelu(self.up(self.norm(x))))
        return x


class UncalledBlock(MlpBlock):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(HIDDEN, HIDDEN)


class TapBlock(MlpBlock):
    """The norm's output is also the residual: dividing it would change the block."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h + self.down(F.gelu(self.up(h)))


class InplaceBlock(MlpBlock):
    """Adds into its argument."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.down(F.gelu(self.up(self.norm(x))))
        x.mul_(0.9)
        return x


class KeywordBlock(MlpBlock):
    """Calls its Linears by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(input=F.gelu(self.up(input=self.norm(x))))


class ModesBlock(MlpBlock):
    """Opens and closes thread-wide modes inside, and notes those it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.up(self.norm(x))
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            h = self.down(F.gelu(h.float()))
        return x + h.clone()


class Net(nn.Module):
    """Embedding, three blocks, norm, lm_head. Takes ids [B, T]; an attention_mask is accepted, as tokenizers send one."""

    def __init__(self, block: Callable[[], nn.Module] = LlamaBlock) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(block() for _ in range(3))
        self.norm = Norm()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class SharedNormNet(Net):
    """One norm for two blocks: a fold for one would spoil the other."""

    def __init__(self) -> None:
        super().__init__(MlpBlock)
        self.layers[1].norm = self.layers[0].norm


class TiedNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head.weight = self.embed.weight


class DictNet(Net):
    """Keyword arguments in, a dict with a tuple inside out; blocks return tuples."""

    class Block(LlamaBlock):
        def forward(self, x: Tensor, *, gain: float = 1.0) -> tuple[Tensor, None]:  # type: ignore[override]
            return super().forward(x) * gain, None

    def __init__(self) -> None:
        super().__init__(DictNet.Block)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        x = self.embed(ids)
        states = []
        for layer in self.layers:
            x, _ = layer(x, gain=0.5)
            states.append(x)
        return {"logits": self.lm_head(self.norm(x)), "hidden_states": tuple(states)}


class ModesNet(Net):
    """Each block is called in another mode; some are left open over several blocks."""

    def __init__(self) -> None:
        super().__init__(ModesBlock)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.layers[0](x)
            with torch.inference_mode():
                x = self.layers[1](x)
        x = self.layers[2](x)
        return self.lm_head(self.norm(x))


class SharedBlockNet(Net):
    """Goes through its blocks two times, so none is finished before the model is."""

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return self.lm_head(self.norm(x))


class CacheNet(Net):
    """Has the key/value cache switch of Transformers; running with the cache on is an error here."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.calibrating = False

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.calibrating and self.config.use_cache:
            raise AssertionError("the cache is on")
        return super().forward(ids)


def sequential_mlp() -> nn.Module:
    """Takes [B, T, 24] floats."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(24, INNER), nn.GELU(), nn.Linear(INNER, 24)) for _ in range(3)))


@dataclass
class Case:
    """A model and its calibration batches, of different lengths."""

    model: nn.Module
    batches: list[Tensor]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": sequential_mlp,
    "llama": Net,
    "twice": lambda: Net(TwiceBlock),
    "uncalled": lambda: Net(UncalledBlock),
    "offset": lambda: Net(lambda: LlamaBlock(lambda: Norm(offset=True))),
    "layernorm": lambda: Net(lambda: MlpBlock(layer_norm)),
    "tap": lambda: Net(TapBlock),
    "shared_norm": SharedNormNet,
    "tied": TiedNet,
    "dict": DictNet,
    "modes": ModesNet,
    "shared_block": SharedBlockNet,
    "inplace": lambda: Net(InplaceBlock),
    "cache": CacheNet,
    "keyword": lambda: Net(KeywordBlock),
}


def layer_norm() -> nn.LayerNorm:
    """LayerNorm with gains and offsets that differ between channels."""
    norm = nn.LayerNorm(HIDDEN)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(HIDDEN).mul(0.8).exp())
        norm.bias.normal_()
    return norm


def token_batches(lengths: tuple[int, ...] = (17, 30, 9, 24)) -> list[Tensor]:
    """ids [2, T] for every T."""
    return [torch.randint(0, VOCAB, (2, length)) for length in lengths]


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """The model ``name`` in eval mode with its batches, the same at every call."""
    torch.manual_seed(seed)
    model = MODELS[name]().to(dtype).eval()
    if name == "mlp":
        scale = torch.randn(24).exp()
        return Case(model, [(torch.randn(2, t, 24) * scale).to(dtype) for t in (17, 30, 9, 24)])
    return Case(model, token_batches())


def logits(output: Any) -> Tensor:
    """The tensor to compare in whatever a model returned."""
    return output["logits"] if isinstance(output, dict) else output
