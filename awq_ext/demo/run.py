"""What the demo measures: a trained model as it is and quantized six ways, and a layer of a large model on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..evaluation.bootstrap import Estimate
from ..evaluation.compare import compare
from ..evaluation.comparison import Comparison
from ..evaluation.cost import layer_seconds
from ..layers.sizes import model_bytes
from ..reporting.sizes import packed_bytes
from . import data
from .model import load_demo_model
from .theory import Example

# One scale a row: rows have 192 and 512 channels only, and the smaller the group, the less there is to repair. Loss added
# on 131,072 held-out bytes with 16 batches of calibration, in thousandths of a nat, RTN -> AWQ: groups of 64: 12.3 -> 10.6 at
# 4 bits, 60.7 -> 42.9 at 3; groups of 128: 14.9 -> 10.1, 69.2 -> 49.7; rows: 18.5 -> 12.5, 94.3 -> 57.3. Large models show it
# with groups of 128.
GROUP_SIZE = -1
TOKENS = 16_384  # divergence varies little between windows: so few tell the methods apart
CALIBRATION_BATCHES = 8
BYTES_PER_FLOAT = 2  # the shipped weights are bf16, and what is not quantized would be saved as such
TEXT = "held-out"
WINDOWS_AT_ONCE = 8
BITS = (4, 3)
RTN, OTHERS = "RTN", ("AWQ", "AWQ+GPTQ")
# 4 bits are packed into int4 layers; other widths are rounded but kept as floats.
METHODS = {
    f"{method} {bits} bit": {"method": method.lower(), "bits": bits, "packed": bits == 4}
    for bits in BITS
    for method in (RTN, *OTHERS)
}
LAYER = (4096, 4096)  # inputs and outputs: q_proj and o_proj of Llama 3 8B and Qwen3 8B
LAYER_GROUP = 128  # that of layer_seconds, and the default
DECODE, PREFILL = 1, 512


@dataclass(frozen=True)
class LayerCost:
    """One layer in bf16 and in int4: bytes of its weight, and seconds of a call: rows -> {"float": seconds, "int4": seconds}."""

    in_features: int
    out_features: int
    float_bytes: int
    int4_bytes: int
    seconds: Mapping[int, Mapping[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**vars(self), "seconds": {str(rows): dict(took) for rows, took in self.seconds.items()}}


@dataclass(frozen=True)
class Removed:
    """How much of RTN's divergence a method removes: ``share`` (negative: it adds some), and RTN's minus its own in nats."""

    share: float
    difference: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"share": self.share, "difference": self.difference.to_dict()}


@dataclass(frozen=True)
class DemoResult:
    """All that a run computed and measured."""

    example: Example
    comparison: Comparison
    layer: LayerCost
    group_size: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: those of the comparison, and what each method removes of RTN's divergence."""
        return self.comparison.to_dict() | {
            "group_size": self.group_size,
            "seconds": self.seconds,
            "example": self.example.to_dict(),
            "removed": {
                f"{method}_{bits}_bit": removed(self.comparison, method, bits).to_dict()
                for bits in BITS
                for method in OTHERS
            },
            "layer": self.layer.to_dict(),
        }


def divergence(found: Comparison, label: str) -> float:
    """Look up the divergence of a row from the float model, in nats a byte."""
    return found[label].evaluations[TEXT].measures["kl"].value


def removed(found: Comparison, method: str, bits: int) -> Removed:
    """Compare a method with RTN at one width, paired over windows."""
    rtn, own = f"{RTN} {bits} bit", f"{method} {bits} bit"
    before = divergence(found, rtn)
    share = 1 - divergence(found, own) / before if before > 0 else 0.0
    return Removed(share, found.difference(rtn, own, TEXT, "kl"))


def compare_methods(tokens: int = TOKENS, group_size: int = GROUP_SIZE, progress: bool = False) -> Comparison:
    """Quantize the demo's model by all of ``METHODS`` and score each on about ``tokens`` held-out bytes.

    RuntimeError where a method fails.
    """
    sizes: dict[str, int] = {}

    def look(label: str, model: nn.Module) -> None:
        sizes[label] = model_bytes(model, BYTES_PER_FLOAT)

    found = compare(
        load_demo_model(torch.float32),
        data.calibration_batches(CALIBRATION_BATCHES),
        {TEXT: data.held_out_tokens(tokens).split(WINDOWS_AT_ONCE)},
        METHODS,
        speed_seconds=0,  # a model that fits in the processor's cache says nothing of the speed of large ones
        on_model=look,
        progress=progress,
        group_size=group_size,
    )
    if failed := [f"{row.label}: {row.error}" for row in found.rows if row.error]:
        raise RuntimeError("; ".join(failed))
    return replace(found, rows=[replace(row, size_bytes=sizes[row.label]) for row in found.rows])


def measure_layer(in_features: int = LAYER[0], out_features: int = LAYER[1], seconds: float = 0.3) -> LayerCost:
    """Time one layer of random weights with ``DECODE`` and ``PREFILL`` rows, for about ``seconds`` each and for bf16 and int4."""
    took = layer_seconds((DECODE, PREFILL), in_features, out_features, seconds)
    int4 = packed_bytes(in_features, out_features, LAYER_GROUP, bits=4)
    return LayerCost(in_features, out_features, BYTES_PER_FLOAT * in_features * out_features, int4, took)
