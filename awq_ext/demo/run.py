"""Run the demo's measurement: one trained model, as it is and quantized four ways, on text that it never saw."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..evaluation.compare import compare
from ..evaluation.comparison import Comparison
from ..evaluation.cost import model_bytes
from . import data
from .model import load_demo_model

# One scale a row: rows have 192 and 512 channels only, and the smaller the group, the less there is to repair. Loss added
# on 131,072 held-out bytes, in thousandths of a nat, RTN -> AWQ: groups of 64: 12.3 -> 10.6 at 4 bits, 60.7 -> 42.9 at 3;
# groups of 128: 14.9 -> 10.1, 69.2 -> 49.7; rows: 18.5 -> 12.5, 94.3 -> 57.3. Large models show it with groups of 128.
GROUP_SIZE = -1
TOKENS = 131_072
PROMPT = b"class Stack:\n    def __init__(self, items=None):\n"
COMPLETION_BYTES = 96
BYTES_PER_FLOAT = 2  # the shipped weights are bf16, and what is not quantized would be saved as such
TEXT = "held-out"
WINDOWS_AT_ONCE = 8
BITS = (4, 3)
# 4 bits are packed into int4 layers; other widths are rounded but kept as floats.
METHODS = {
    f"{method.upper()} {bits} bit": {"method": method, "bits": bits, "packed": bits == 4}
    for bits in BITS
    for method in ("rtn", "awq")
}


@dataclass(frozen=True)
class DemoResult:
    """All that a run measured; completions: what each model wrote after the prompt, by label."""

    comparison: Comparison
    completions: Mapping[str, bytes]
    group_size: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: those of the comparison, what each model wrote, and AWQ beside RTN."""
        figures = self.comparison.to_dict()
        for row in figures["rows"]:
            row["completion"] = self.completions[row["label"]].decode("utf-8", "replace")
        pairs = {f"{bits}_bit": (f"RTN {bits} bit", f"AWQ {bits} bit") for bits in BITS}
        return figures | {
            "group_size": self.group_size,
            "seconds": self.seconds,
            "gap_closed": {k: self.comparison.gap_closed(awq, TEXT, rtn) for k, (rtn, awq) in pairs.items()},
            "rtn_minus_awq": {k: self.comparison.difference(*pair, TEXT).to_dict() for k, pair in pairs.items()},
        }


def run_demo(tokens: int = TOKENS, group_size: int = GROUP_SIZE, progress: bool = False) -> DemoResult:
    """Quantize the demo's model by all of ``METHODS`` and score each on about ``tokens`` held-out bytes."""
    began = time.perf_counter()
    sizes: dict[str, int] = {}
    completions: dict[str, bytes] = {}

    def look(label: str, model: nn.Module) -> None:
        sizes[label] = model_bytes(model, BYTES_PER_FLOAT)
        completions[label] = model.generate(PROMPT, COMPLETION_BYTES)

    found = compare(
        load_demo_model(torch.float32),
        data.calibration_batches(),
        {TEXT: data.held_out_tokens(tokens).split(WINDOWS_AT_ONCE)},
        METHODS,
        on_model=look,
        progress=progress,
        group_size=group_size,
    )
    if failed := [f"{row.label}: {row.error}" for row in found.rows if row.error]:
        raise RuntimeError("; ".join(failed))
    found = replace(found, rows=[replace(row, size_bytes=sizes[row.label]) for row in found.rows])
    return DemoResult(found, completions, group_size, time.perf_counter() - began)
