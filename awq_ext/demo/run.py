"""What ``awq-ext demo`` measures: one trained model, as it is and quantized four ways, on text it never saw.

Everything in a :class:`DemoResult` is measured in the run that returns it. Every variant scores the same windows, so a
difference between two of them is known better than either perplexity: see :func:`compare`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..evaluation import cost as speed
from ..evaluation.cost import model_bytes
from ..pipeline.quantize import quantize
from . import data
from .model import ByteLlama, load_demo_model

# One scale a row: rows have 192 and 512 channels only, and the smaller the group, the less there is to repair. Loss added
# on 131,072 held-out bytes, in thousandths of a nat, RTN -> AWQ: groups of 64: 12.3 -> 10.6 at 4 bits, 60.7 -> 42.9 at 3;
# groups of 128: 14.9 -> 10.1, 69.2 -> 49.7; rows: 18.5 -> 12.5, 94.3 -> 57.3. Large models show it with groups of 128.
GROUP_SIZE = -1
TOKENS = 131_072
PROMPT = b"class Stack:\n    def __init__(self, items=None):\n"
COMPLETION_BYTES = 96
SPEED_SECONDS = 0.6  # for each speed
BYTES_PER_FLOAT = 2  # the shipped weights are bf16, and what is not quantized would be saved as such


@dataclass(frozen=True)
class Variant:
    """One way to round the weights; 4 bits are packed into int4 layers, other widths are rounded but kept as floats."""

    method: str
    bits: int

    @property
    def packed(self) -> bool:
        return self.bits == 4

    @property
    def name(self) -> str:
        return f"{self.method.upper()} {self.bits} bit"


FLOAT_NAME = "float (bf16)"
VARIANTS = tuple(Variant(method, bits) for bits in (4, 3) for method in ("rtn", "awq"))


@dataclass(frozen=True)
class Row:
    """One line of the table. losses: mean nats a byte of each window [windows]; no speeds where nothing is packed."""

    name: str
    bits: int
    losses: Tensor
    size_bytes: int
    completion: bytes
    simulated: bool = False
    seconds: float | None = None
    scoring_speed: float | None = None
    stepping_speed: float | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean loss: the number of equally likely bytes the model hesitates between."""
        return math.exp(self.losses.mean().item())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "name": self.name,
            "bits": self.bits,
            "perplexity": self.perplexity,
            "bits_per_byte": self.losses.mean().item() / math.log(2),
            "size_bytes": self.size_bytes,
            "simulated": self.simulated,
            "seconds_to_quantize": self.seconds,
            "tokens_per_second_scoring": self.scoring_speed,
            "tokens_per_second_one_at_a_time": self.stepping_speed,
            "completion": self.completion.decode("utf-8", "replace"),
        }


@dataclass(frozen=True)
class Comparison:
    """RTN and AWQ at one width. Differences are in nats a byte, with the standard error of their mean over windows."""

    bits: int
    rtn_cost: float
    rtn_cost_error: float
    awq_gain: float
    awq_gain_error: float
    gap_closed: float | None

    @property
    def rtn_hurts(self) -> bool:
        """RTN is worse than the float model by more than two standard errors."""
        return self.rtn_cost > 2 * self.rtn_cost_error

    @property
    def decided(self) -> bool:
        """AWQ and RTN differ by more than two standard errors."""
        return abs(self.awq_gain) > 2 * self.awq_gain_error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; an error of one window only is unknown and becomes None."""
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(self).items()}
        return known | {"rtn_hurts": self.rtn_hurts, "decided": self.decided}


@dataclass(frozen=True)
class DemoResult:
    """All that a run measured."""

    tokens: int
    group_size: int
    threads: int
    rows: list[Row]
    comparisons: list[Comparison]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "tokens": self.tokens,
            "group_size": self.group_size,
            "threads": self.threads,
            "seconds": self.seconds,
            "rows": [row.to_dict() for row in self.rows],
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }


@torch.no_grad()
def score(model: nn.Module, windows: Tensor, batch: int = 16) -> Tensor:
    """Mean loss in nats of each window int64 [count, S]: fp64 [count]. A window's first byte is given, not scored."""
    losses = []
    for part in windows.split(batch):
        logits = model(part[:, :-1]).float()
        nats = F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        losses.append(nats.double().mean(1))
    return torch.cat(losses)


def race(models: dict[str, nn.Module], input_ids: Tensor, seconds: float = SPEED_SECONDS) -> dict[str, float]:
    """Tokens a second of each ``model(input_ids)``."""
    took = speed.race({name: partial(model, input_ids) for name, model in models.items()}, seconds)
    return {name: input_ids.numel() / duration for name, duration in took.items()}


def measure(name: str, model: ByteLlama, windows: Tensor, variant: Variant | None, seconds: float | None) -> Row:
    """Perplexity, size and completion of one model."""
    return Row(
        name=name,
        bits=variant.bits if variant else 16,
        simulated=variant is not None and not variant.packed,
        losses=score(model, windows),
        size_bytes=model_bytes(model, BYTES_PER_FLOAT),
        completion=model.generate(PROMPT, COMPLETION_BYTES),
        seconds=seconds,
    )


def quantize_variant(variant: Variant, group_size: int) -> tuple[ByteLlama, float]:
    """A fresh copy of the demo's model, quantized, and the seconds that took."""
    model = load_demo_model(torch.float32)
    calibration = data.calibration_batches()
    began = time.perf_counter()
    model = quantize(
        model,
        calibration,
        progress=False,
        method=variant.method,
        bits=variant.bits,
        packed=variant.packed,
        group_size=group_size,
    )
    return model, time.perf_counter() - began


def compare(bits: int, reference_row: Row, rtn: Row, awq: Row) -> Comparison:
    """What RTN costs and what AWQ gives back, from losses on the same windows."""

    def paired(worse: Row, better: Row) -> tuple[float, float]:
        difference = worse.losses - better.losses
        count = difference.numel()
        error = difference.std().item() / math.sqrt(count) if count > 1 else math.inf
        return difference.mean().item(), error

    cost, cost_error = paired(rtn, reference_row)
    gain, gain_error = paired(rtn, awq)
    gap = rtn.perplexity - reference_row.perplexity
    closed = (rtn.perplexity - awq.perplexity) / gap if gap > 0 else None
    return Comparison(bits, cost, cost_error, gain, gain_error, closed)


def run_demo(
    tokens: int = TOKENS, group_size: int = GROUP_SIZE, on_step: Callable[[str, int, int], None] = lambda *_: None
) -> DemoResult:
    """Measure every variant; ``on_step(what, done, total)`` is told before each piece of work."""
    began = time.perf_counter()
    total = 2 + 2 * len(VARIANTS)
    on_step("scoring the float model", 0, total)
    windows = data.held_out_tokens(tokens)
    model = load_demo_model(torch.float32)
    rows = [measure(FLOAT_NAME, model, windows, None, None)]
    timed: dict[str, nn.Module] = {FLOAT_NAME: model}
    for index, variant in enumerate(VARIANTS):
        on_step(f"quantizing: {variant.name}", 1 + 2 * index, total)
        model, seconds = quantize_variant(variant, group_size)
        on_step(f"scoring: {variant.name}", 2 + 2 * index, total)
        rows.append(measure(variant.name, model, windows, variant, seconds))
        if variant.packed:
            timed[variant.name] = model
    on_step("timing float and int4", total - 1, total)
    rows = with_speeds(rows, timed, windows[:8, :-1])
    on_step("done", total, total)
    by_name = {row.name: row for row in rows}
    pairs = [(bits, by_name[f"RTN {bits} bit"], by_name[f"AWQ {bits} bit"]) for bits in (4, 3)]
    return DemoResult(
        tokens=windows.shape[0] * (windows.shape[1] - 1),
        group_size=group_size,
        threads=torch.get_num_threads(),
        rows=rows,
        comparisons=[compare(bits, rows[0], rtn, awq) for bits, rtn, awq in pairs],
        seconds=time.perf_counter() - began,
    )


def with_speeds(rows: list[Row], models: dict[str, nn.Module], sample: Tensor) -> list[Row]:
    """The rows, with the speed of those in ``models`` on 8 windows at once and on a single byte."""
    scoring, stepping = race(models, sample), race(models, sample[:1, :1])
    return [replace(row, scoring_speed=scoring.get(row.name), stepping_speed=stepping.get(row.name)) for row in rows]
