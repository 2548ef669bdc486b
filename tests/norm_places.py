"""AWQ's error against RTN's in small random models, some with norms before their Linears and some with norms behind them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from architectures import loud
from torch import Tensor, nn

import awq_ext

VOCAB, LAYERS, HEADS = 256, 2, 4
BEFORE, BEHIND = ("Llama", "Qwen3"), ("Olmo2", "Exaone4")
# What is drawn at random: "loud" draws gains, embeddings and weights as ``architectures.loud`` does, "flat" has gains of 1 instead,
# "own" leaves all as transformers initializes it.
WEIGHTS = ("loud", "flat", "own")


@dataclass(frozen=True)
class Ratio:
    """AWQ's error divided by RTN's: of the logits on other tokens than calibration had, and of the mean layer (root of squares)."""

    model: float
    layers: float


def make(family: str, weights: str, width: int, seed: int) -> nn.Module:
    """The language model of one seed in eval mode."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=width // HEADS,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{"sliding_window": None, "layer_types": ["full_attention"] * LAYERS} if family == "Exaone4" else {},
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if weights != "own":
        loud(model)
    if weights == "flat":
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1)
    return model


def ratio(
    family: str, weights: str, width: int, seed: int, batches: int = 8, tokens: int = 32, **settings: Any
) -> Ratio:
    """Quantize one model by RTN and by AWQ, calibrated on ``batches`` x 2 x ``tokens`` tokens.

    A weight group is a quarter of the width, and 16 channels at least.
    """
    model = make(family, weights, width, seed)
    calibration = [torch.randint(3, VOCAB, (2, tokens)) for _ in range(batches)]
    others = [torch.randint(3, VOCAB, (2, tokens)) for _ in range(4)]
    errors: dict[str, float] = {}
    for method in ("rtn", "awq"):
        given = {"method": method, "group_size": max(16, width // 4), "progress": False} | settings
        found = awq_ext.quantize(copy.deepcopy(model), calibration, **given)
        errors[method] = _error(found, model, others)
    layers = [row.loss / row.loss_rtn for row in found.awq_report.layers if row.loss_rtn]
    return Ratio(errors["awq"] / errors["rtn"], math.sqrt(sum(layers) / len(layers)))


@torch.no_grad()
def _error(model: nn.Module, reference: nn.Module, batches: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((model(x).logits - reference(x).logits).double().square().sum()) for x in batches))


def summary(ratios: Sequence[Ratio]) -> Mapping[str, float]:
    """Geometric mean and standard deviation (of the logarithm) of the models' ratios, and geometric mean of their layers'."""
    model = torch.tensor([one.model for one in ratios], dtype=torch.float64).log()
    layers = torch.tensor([one.layers for one in ratios], dtype=torch.float64).log()
    return {"mean": float(model.mean().exp()), "spread": float(model.std()), "layers": float(layers.mean().exp())}
