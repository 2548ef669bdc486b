"""Memory budget: what quantizing will need beside a plain forward."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import AwqConfig
from ..forwards.calls import Call
from .survey import BlockSurvey

# Rows and packed panels that quadratic_losses (csrc/drivers/quadratic-inl.h) works on at a time, in bytes.
_KERNEL_SLAB = 32 << 20


def planned_bytes(
    surveys: Sequence[BlockSurvey], growth: float, config: AwqConfig, streamed: bool = False, spilled: bool = False
) -> int:
    """Estimate the bytes that quantizing adds to what one plain forward of the first batch needs.

    They are the sum of: hidden states of all batches (``growth`` times the first one's) at one block boundary; statistics of the
    largest block; all new layers (the float ones stay until the end, so that everything can be taken back); and scratch of one
    block. Scratch is its largest second moment, packed for the kernels (and factored, where errors are fed back), its quantized
    weights in float for trials, and its codes twice (with and without clips).

    streamed: new layers go to a file, block by block. spilled: so do hidden states, but for those of two batches.
    """
    hidden = max(s.input_bytes for s in surveys) * (min(growth, 2.0) if spilled else growth)
    statistics = max(statistics_bytes(s) + _centred_bytes(s, config) for s in surveys)
    made = (max if streamed else sum)(made_bytes([s], config) for s in surveys)
    # three fp32 [K, K]: the factor; the whole second moment in panels, for refining; and damped, for the clips
    widths = [m.in_features for s in surveys for n, m in s.linears.items() if config.for_layer(n).uses_gptq]
    factored = 12 * max(widths, default=0) ** 2
    return int(hidden + statistics + made + factored + max(_scratch_bytes(s, config) for s in surveys))


def made_bytes(surveys: Sequence[BlockSurvey], config: AwqConfig) -> int:
    """Add up the bytes of the layers that will be made."""
    weights = {name: linear.weight for s in surveys for name, linear in s.linears.items()}
    sizes = [_code_bytes(config, n) * w.numel() if config.for_layer(n).packed else w.nbytes for n, w in weights.items()]
    return int(sum(sizes))


def statistics_bytes(surveyed: BlockSurvey) -> int:
    """Add up a block's statistics: for each input a second moment (fp32 [K, K]), and sums of x and of |x| (fp64 [K])."""
    widths = [surveyed.linears[part[0]].in_features for group in surveyed.groups for part in group.inputs]
    return sum(4 * k * k + 16 * k for k in widths)


def _code_bytes(config: AwqConfig, name: str) -> float:
    """Bytes of a quantized weight in memory, with its share of scales and zeros: only codes of 4 bits are packed."""
    return 0.6 if config.for_layer(name).bits == 4 else 1.1


def _scratch_bytes(surveyed: BlockSurvey, config: AwqConfig) -> int:
    """Estimate the bytes that solving a block needs for a while, beside its statistics."""
    weights = {name: linear.weight for name, linear in surveyed.linears.items()}
    moment = max((linear.in_features**2 for linear in surveyed.linears.values()), default=0)
    trial = sum(w.numel() * (w.element_size() + 2 * _code_bytes(config, name)) for name, w in weights.items())
    # the upper triangle in fp32, and the largest Linear in fp32 while a trial weight is made of it
    largest = max((8 * weight.numel() for weight in weights.values()), default=0)
    return int(2 * moment + trial + largest + _KERNEL_SLAB)


def _centred_bytes(surveyed: BlockSurvey, config: AwqConfig) -> int:
    """Add up second moments around the mean: one for each input of a Linear whose bias takes over the mean's error."""
    parts = [part for group in surveyed.groups for part in group.inputs]
    inputs = {part[0]: [surveyed.linears[n] for n in part if config.for_layer(n).corrects_bias] for part in parts}
    return sum(4 * ls[0].in_features ** 2 for ls in inputs.values() if any(one.bias is not None for one in ls))


def growth_of(calls: Sequence[Call]) -> float:
    """Compare the elements of all batches with those of the first one."""
    return sum(call.elements for call in calls) / max(calls[0].elements, 1)
