"""Memory budget: what quantizing will need beside the model.

A block is solved in steps, which give back what they took before the next one begins. What counts is the largest of them, in the
block where it is largest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .. import _C
from ..config import AwqConfig
from ..forwards.calls import Call
from ..forwards.memory import SLACK
from ..forwards.recall import MOST_KEPT
from ..kernels.reference import group_count
from ..layers.quantized_weight import row_bytes
from .survey import BlockSurvey

# Rows and packed panels that quadratic_losses (csrc/drivers/quadratic-inl.h) works on at a time, in bytes.
_KERNEL_SLAB = 32 << 20
# What the heap keeps of freed pieces, in bytes. glibc gives pieces below 32 MiB back only from the end of its heap (mallopt(3)):
# with MALLOC_MMAP_THRESHOLD_=131072 the peaks are lower by about this.
_FREED = 32 << 20
# What a thread holds of the rows that it rounds by error feedback on tile registers, in bytes (kFeedbackBytes in
# csrc/drivers/feedback.h); and for each of their weights: weight, error and level in fp32, and a code.
_TILE_ROWS, _TILE_WEIGHT = 16 << 20, 13
# Tensors of the widest layer that a forward of a block has at a time, such as gate, its activation, up and their product.
_LAYERS_AT_ONCE = 4
# While codes are learned each weight has its position and how far it moved, in fp32, and its best code; and in the model's dtype
# the weight, its gradient and their mean, and one more that the allocator has not given back. While one Linear moves, five more in
# fp32.
_LEARNED_FLOATS, _LEARNED_WEIGHTS, _MOVING_FLOATS = 2, 4, 5
# Tensors of the widest layer that a block keeps for a backward.
_LAYERS_KEPT = 16


def planned_bytes(
    surveys: Sequence[BlockSurvey], growth: float, config: AwqConfig, streamed: bool = False, spilled: bool = False
) -> int:
    """Estimate the peak of what quantizing block by block takes beside the model, the forwards of the blocks included.

    For each block it holds the hidden states of all batches (``growth`` times the first one's) at one block boundary, the
    statistics of the block, and all layers made before (the float ones stay until the end, so that everything can be taken back).
    What is needed on top for a while is the largest of :func:`_steps`.

    streamed: new layers go to a file, block by block. spilled: so do hidden states, but for those of two batches.
    """
    waiting = max(s.input_bytes + s.kept_bytes for s in surveys) * (min(growth, 2.0) if spilled else growth)
    peak = made = 0.0
    for one in surveys:
        held = waiting + made + statistics_bytes(one) + _centred_bytes(one, config)
        peak = max(peak, held + max(_steps(one, config), default=0.0), held + _learning_bytes(one, growth, config))
        made += 0 if streamed else made_bytes([one], config)
    return int(peak + SLACK)


def made_bytes(surveys: Sequence[BlockSurvey], config: AwqConfig) -> int:
    """Add up the bytes of the layers that will be made."""
    weights = {name: linear for s in surveys for name, linear in s.linears.items()}
    packed = {name: config.for_layer(name).packed for name in weights}
    return sum(_code_bytes(one, config, name) if packed[name] else one.weight.nbytes for name, one in weights.items())


def statistics_bytes(surveyed: BlockSurvey) -> int:
    """Add up a block's statistics: for each input a second moment (fp32 [K, K]), and sums of x and of |x| (fp64 [K])."""
    widths = [surveyed.linears[part[0]].in_features for group in surveyed.groups for part in group.inputs]
    return sum(4 * k * k + 16 * k for k in widths)


def _code_bytes(linear: nn.Linear, config: AwqConfig, name: str) -> int:
    """Bytes of a Linear's codes, with a 16-bit scale and a zero of a byte for each group."""
    settings, (n, k) = config.for_layer(name), linear.weight.shape
    return int(n * (row_bytes(k, settings.bits) + 3 * group_count(k, settings.group_size)))


def _steps(surveyed: BlockSurvey, config: AwqConfig) -> list[float]:
    """Estimate what each step of solving a block needs beside its statistics: rounding, trials of folds and clips, new layers."""
    linears = surveyed.linears
    if not linears:
        return []
    forward = _LAYERS_AT_ONCE * surveyed.widest_bytes + 2 * surveyed.input_bytes
    trial = sum(linear.weight.nbytes for linear in linears.values())
    largest = max(linears.values(), key=lambda linear: linear.weight.numel()).weight
    # the last trial weight is made while all others are there: in fp32, before and after a factor
    one_more = max(0, 8 - largest.element_size()) * largest.numel()
    codes = sum(_kept_codes(linear, config, name) for name, linear in linears.items())
    rounding, scratch = _rounding_bytes(surveyed, config)
    sketches = codes if config.clip == "auto" and not config.uses_gptq else 0
    recalled = _recalled_bytes(surveyed)
    return [
        rounding,
        trial + max(one_more, forward) + recalled,
        codes + trial + max(one_more, forward),
        codes + sketches + trial + recalled + _unit_bytes(surveyed) + max(one_more - largest.nbytes, forward),
        # without its clip a layer is rounded once more, in the middle of it all; GPTQ has kept what it found
        codes + trial + (0 if config.uses_gptq else scratch),
        codes + made_bytes([surveyed], config),
    ]


def _recalled_bytes(surveyed: BlockSurvey) -> float:
    """Estimate what is kept of one forward of the block: inputs and outputs of its Linears, each at most the widest tensor."""
    linears = surveyed.linears
    read = [linears[part[0]].in_features for group in surveyed.groups for part in group.inputs]
    made = [linear.out_features for linear in linears.values()]
    return min(MOST_KEPT, surveyed.widest_bytes * sum(read + made) / max(read + made))


def _learning_bytes(surveyed: BlockSurvey, growth: float, config: AwqConfig) -> float:
    """Estimate what learning the codes of a block takes: of each weight what its steps need, and hidden states of all batches.

    These are the outputs of the float block, and what arrives behind quantized blocks.
    """
    if not config.learn_rounding:
        return 0.0
    weights = [linear.weight for linear in surveyed.linears.values()]
    held = sum((4 * _LEARNED_FLOATS + 1) * one.numel() + _LEARNED_WEIGHTS * one.nbytes for one in weights)
    moving = 4 * _MOVING_FLOATS * max((one.numel() for one in weights), default=0)
    codes = sum(_kept_codes(linear, config, name) for name, linear in surveyed.linears.items())
    # a part of what the heap keeps is counted above
    freed = min(_FREED, moving) / 2
    return codes + held + moving + freed + 2 * surveyed.input_bytes * growth + _LAYERS_KEPT * surveyed.widest_bytes


def _unit_bytes(surveyed: BlockSurvey) -> int:
    """Bytes of the weights whose clips are tried together: of one Linear, or of all experts of one kind."""
    families: dict[str, int] = {}
    for group in surveyed.groups:
        for name in group.linears:
            kind = group.family or repr(group.linears) if name in group.experts else name
            families[kind] = families.get(kind, 0) + surveyed.linears[name].weight.nbytes
    return max(families.values(), default=0)


def _rounding_bytes(surveyed: BlockSurvey, config: AwqConfig) -> tuple[float, float]:
    """Estimate what rounding takes at its peak, with the codes of all Linears so far, and alone for any one Linear."""
    kept = peak = alone = 0.0
    for group in reversed(surveyed.groups):  # rounded from the last to the first
        first = config.for_layer(group.linears[0])
        # a scale of a later group may be folded into the rows of these
        divided = group is not surveyed.groups[-1] and first.searches_scale and config.fold != "never"
        for name in group.linears:
            scratch = _scratch_bytes(surveyed.linears[name], config.for_layer(name), divided)
            peak, alone = max(peak, kept + scratch), max(alone, scratch)
            kept += _kept_codes(surveyed.linears[name], config, name)
    return peak, alone


def _kept_codes(linear: nn.Linear, config: AwqConfig, name: str) -> int:
    """Bytes of the codes that are kept of a Linear until its block is solved: with clips and without where both are tried."""
    settings = config.for_layer(name)
    twice = settings.clip is not False and settings.method != "rtn"
    return _code_bytes(linear, config, name) * (2 if twice else 1)


def _scratch_bytes(linear: nn.Linear, settings: AwqConfig, divided: bool) -> float:
    """Estimate what rounding one Linear takes beside the second moment of its input.

    divided: whether its rows are divided first.
    """
    weight, (n, k) = linear.weight, linear.weight.shape
    slab = min(_KERNEL_SLAB, 8 * n * k)
    # the upper triangle of the second moment in fp32, packed
    panels = 2 * k * k
    if settings.uses_gptq:
        # its factor; and for refining and for clips the whole second moment once more
        tiles = min(torch.get_num_threads() * _TILE_ROWS, _TILE_WEIGHT * n * k) if _C.isa().startswith("amx") else 0
        panels = 4 * k * k + max(4 * k * k, panels + slab) + min(_FREED, 8 * n * k) + tiles
        slab = 0
    # the rows that were not compared yet: the weight, a byte a code, and packed codes three times while they are put in order
    rows = weight.numel() * ((4 if divided else weight.element_size()) + 1 + 1.5)
    dividing = weight.numel() * (weight.element_size() + 8) if divided else 0
    return max(rows + panels + slab, dividing)


def _centred_bytes(surveyed: BlockSurvey, config: AwqConfig) -> int:
    """Add up second moments around the mean: one for each input of a Linear whose bias takes over the mean's error."""
    parts = [part for group in surveyed.groups for part in group.inputs]
    inputs = {part[0]: [surveyed.linears[n] for n in part if config.for_layer(n).corrects_bias] for part in parts}
    return sum(4 * ls[0].in_features ** 2 for ls in inputs.values() if any(one.bias is not None for one in ls))


def growth_of(calls: Sequence[Call]) -> float:
    """Compare the elements of all batches with those of the first one."""
    return sum(call.elements for call in calls) / max(calls[0].elements, 1)
