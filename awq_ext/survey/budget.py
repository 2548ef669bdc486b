"""Planned memory: what quantizing will need beside a plain forward."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import AwqConfig
from ..forwards.calls import Call
from .survey import BlockSurvey

# Rows and packed panels that quadratic_losses (csrc/drivers/quadratic-inl.h) works on at a time, in bytes.
_KERNEL_SLAB = 32 << 20


def planned_bytes(surveys: Sequence[BlockSurvey], growth: float, config: AwqConfig) -> int:
    """Memory that quantizing adds to what one plain forward of the first batch needs.

    Hidden states of all batches (``growth`` times the first one's) at one block boundary + statistics of the largest block +
    the new layers made so far (the float ones stay until the end, so that everything can be taken back) + scratch of one
    block: its largest second moment packed for the kernels (and factored, where errors are fed back), its quantized weights in
    float for trials, its codes twice (with and without clips).
    """
    hidden = max(s.input_bytes for s in surveys) * growth
    statistics = max(statistics_bytes(s) + _centred_bytes(s, config) for s in surveys)
    weights = {name: linear.weight for s in surveys for name, linear in s.linears.items()}
    made = sum(0.6 * w.numel() if config.for_layer(name).packed else w.nbytes for name, w in weights.items())
    # the factor; the whole moment in panels for refining; and damped, for the clips
    widths = [m.in_features for s in surveys for n, m in s.linears.items() if config.for_layer(n).uses_gptq]
    factored = 12 * max(widths, default=0) ** 2
    return int(hidden + statistics + made + factored + max(_scratch_bytes(s) for s in surveys))


def statistics_bytes(surveyed: BlockSurvey) -> int:
    """Bytes of a block's second moments (fp32 [K, K]) and sums of x and |x| (fp64 [K]), one of each an input."""
    widths = [surveyed.linears[part[0]].in_features for group in surveyed.groups for part in group.inputs]
    return sum(4 * k * k + 16 * k for k in widths)


def _scratch_bytes(surveyed: BlockSurvey) -> int:
    """Bytes that solving a block needs for a while, beside its statistics."""
    weights = [linear.weight for linear in surveyed.linears.values()]
    moment = max((linear.in_features**2 for linear in surveyed.linears.values()), default=0)
    trial = sum(weight.numel() * (weight.element_size() + 2 * 0.6) for weight in weights)
    # the upper triangle in fp32, and the largest Linear in fp32 while a trial weight is made of it
    largest = max((8 * weight.numel() for weight in weights), default=0)
    return int(2 * moment + trial + largest + _KERNEL_SLAB)


def _centred_bytes(surveyed: BlockSurvey, config: AwqConfig) -> int:
    """Second moments around the mean, one for each input of a Linear whose bias takes over the mean's error."""
    parts = [part for group in surveyed.groups for part in group.inputs]
    inputs = {part[0]: [surveyed.linears[n] for n in part if config.for_layer(n).corrects_bias] for part in parts}
    return sum(4 * ls[0].in_features ** 2 for ls in inputs.values() if any(one.bias is not None for one in ls))


def growth_of(calls: Sequence[Call]) -> float:
    """How many times the first batch all batches are, in elements."""
    return sum(call.elements for call in calls) / max(calls[0].elements, 1)
