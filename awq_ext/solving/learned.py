"""Codes and scales of a block learned together (as AutoRound, arXiv 2309.05516, does), starting at those that were found.

The search and error feedback solve one Linear at a time. What the errors of a block's Linears do together, in attention scores and
in products with gates, only its output tells. So positions between codes, and the scales of weight groups, take gradient steps on
the error of the output, and a position that passes the middle between two codes has the other one. Batches that take no part
decide whether what was learned stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..forwards.outputs import norm_of
from ..forwards.probe import Probe
from ..kernels.reference import expand_groups
from ..layers.quantized_weight import QuantizedWeight
from .rounding import divided, mean_loss
from .solution import GroupSolution, LayerSolution, substitutes_of

# Of the first step: of positions, in codes, and of scales, as a share. Both fall to 0 in a line.
RATE, SCALE_RATE = 3.5e-3, 1e-3
# A step goes against the sign of a running mean of gradients, which keeps this share of what it was (signSGD with momentum, arXiv
# 1802.04434): one batch has few rows for the many weights, so signs of its gradient alone are half noise.
MOMENTUM = 0.7
# Steps, of a batch each, after which the held-out batches are asked.
LOOK = 60
# One batch of so many is kept for the decision.
HELD = 8
# A position begins where the float weight lies, but at most so far from the code that was found: a step must not undo that.
_NEAR = 0.45
# A row of the output counts as no smaller than this share of the median one: rows that a ReLU has set to 0 would count alone.
_LEAST_SIZE = 0.01


@dataclass(frozen=True)
class Learned:
    """What learning did: the output's relative squared error on the batches that took no part, before and after."""

    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether what was learned stays."""
        return self.after < self.before


def learn_rounding(
    probes: Sequence[Probe], groups: Sequence[GroupSolution], steps: int
) -> tuple[list[GroupSolution], Learned | None]:
    """Learn the codes and scales of a block's Linears, which keep theirs unless the held-out batches gain.

    probes: of all batches, whose runs keep what a backward needs. A Linear that would then lose more than with RTN keeps its
    codes. None where there is nothing to learn: fewer than two batches, or no Linear with a search and fewer than 8 bits. Raises
    RuntimeError for a block that has no gradients.
    """
    layers = [_Rounding(layer) for group in groups for layer in group.layers if _learns(layer)]
    held = range(min(HELD, len(probes)) // 2, len(probes), HELD)
    judged, seen = [probes[i] for i in held], [one for i, one in enumerate(probes) if i not in held]
    if not layers or not judged or not seen:
        return list(groups), None
    fixed, factor = _fixed(groups, [layer.given for layer in layers]), _factor(seen[0])
    before = best = _judge(judged, fixed | _weights(layers))
    for step, chosen in enumerate(_order(len(seen), steps)):
        _take_step(layers, seen[chosen], fixed, 1 - step / steps, factor)
        if (step + 1) % LOOK == 0 or step + 1 == steps:
            now = _judge(judged, fixed | _weights(layers))
            if now < best:
                best = now
                for layer in layers:
                    layer.note()
    if not best < before:
        return list(groups), Learned(before, before)
    solved = {id(layer.given): layer.solution() for layer in layers}
    found = [replace(one, layers=tuple(solved.get(id(layer), layer) for layer in one.layers)) for one in groups]
    if all(solved[id(layer.given)] is not layer.given for layer in layers):
        return found, Learned(before, best)
    after = _judge(judged, substitutes_of(layer for group in found for layer in group.layers))
    return (found, Learned(before, after)) if after < before else (list(groups), Learned(before, before))


def _order(batches: int, steps: int) -> list[int]:
    """Draw the batch of each step: all of them once, in another order each time, before any comes again."""
    generator = torch.Generator().manual_seed(0)
    rounds = [torch.randperm(batches, generator=generator) for _ in range(-(-steps // batches))]
    return torch.cat(rounds)[:steps].tolist() if rounds else []


def _fixed(groups: Sequence[GroupSolution], learned: Sequence[LayerSolution]) -> dict[tuple[nn.Module, str], Tensor]:
    """Make the substitutes of all that is not learned: other Linears, and biases."""
    moving = {(layer.task.linear, "weight") for layer in learned}
    found = {}
    for group in groups:
        for layer in group.layers:
            found |= {key: value for key, value in layer.substitutes().items() if key not in moving}
    return found


def _learns(layer: LayerSolution) -> bool:
    settings = layer.task.settings
    return not layer.task.problem and settings.method != "rtn" and settings.bits < 8


class _Rounding:
    """The codes of one Linear while they are learned. given: as it was found."""

    def __init__(self, layer: LayerSolution) -> None:
        self.given = layer
        found = layer.found
        self._scales, self._zeros = found.scales.float(), found.zeros.float()
        self._thetas = torch.zeros_like(self._scales)
        target = divided(layer.task.weight, layer.divisor).to(torch.float32, copy=True)
        if layer.scale is not None:
            target.mul_(layer.scale)
        codes = found.codes().float()
        scales, zeros = (expand_groups(one, found.in_features, found.group_size) for one in (self._scales, self._zeros))
        target.div_(scales).add_(zeros)
        self._start = codes + (target - codes).clamp_(-_NEAR, _NEAR)
        self._moved = torch.zeros_like(codes)
        self._mean = torch.zeros_like(layer.task.linear.weight)
        self._best = found

    def _codes(self) -> Tensor:
        return (self._start + self._moved).round_().clamp_(0, 2**self.given.found.bits - 1)

    def _stored_scales(self) -> Tensor:
        dtype = self.given.found.scales.dtype
        most = torch.finfo(dtype).max
        return (self._scales * self._thetas.exp()).clamp_(-most, most).to(dtype)

    def _state(self) -> dict[str, Any]:
        """Return what both kernels are told beside the positions' start."""
        given, found = self.given, self.given.found
        return {
            "moved": self._moved,
            "scales": self._stored_scales().float(),
            "zeros": self._zeros,
            "group_size": found.group_size,
            "bits": found.bits,
            "channel_scale": given.scale,
            "divisor": given.divisor,
        }

    def weight(self) -> Tensor:
        """Dequantize to the original space, as ``LayerSolution.weight`` does: [N, K], of the Linear's dtype."""
        return kernels.learned_weight(self._start, dtype=self.given.task.linear.weight.dtype, **self._state())

    def move(self, gradient: Tensor, rate: float) -> None:
        """Step against the sign of the mean gradient of :meth:`weight`. gradient [N, K]: that of one more batch."""
        self._mean.lerp_(gradient, 1 - MOMENTUM)
        rates = {"rate": RATE * rate, "theta_rate": SCALE_RATE * rate}
        kernels.move_learned(self._start, thetas=self._thetas, gradient=self._mean, **rates, **self._state())

    def note(self) -> None:
        """Note the codes and scales of now as the best ones."""
        found = self.given.found
        codes, zeros = self._codes().to(torch.uint8), found.zeros
        self._best = QuantizedWeight.of_codes(codes, self._stored_scales(), zeros, found.group_size, found.bits)

    def solution(self) -> LayerSolution:
        """Return the best solution, or the given one where the Linear alone would lose more than RTN."""
        given = self.given
        loss = mean_loss(given.task, self._best, given.scale, given.divisor)
        return replace(given, found=self._best, loss=loss) if loss <= given.limit else given


def _weights(layers: Sequence[_Rounding]) -> dict[tuple[nn.Module, str], Tensor]:
    linears = [layer.given.task.linear for layer in layers]
    return {(linear, "weight"): layer.weight() for linear, layer in zip(linears, layers, strict=True)}


def _factor(probe: Probe) -> float:
    """Choose a power of two for all gradients, of which only the signs count: in fp16 a mean over many entries has none but 0."""
    output = next((one for one in probe.reference if one.dim() > 1), torch.zeros(0))
    size = norm_of([output]) * output.numel() ** 0.5
    return 2.0 ** round(math.log2(size)) if 0 < size < math.inf else 1.0


def _take_step(
    layers: Sequence[_Rounding],
    probe: Probe,
    fixed: Mapping[tuple[nn.Module, str], Tensor],
    rate: float,
    factor: float,
) -> None:
    weights = _weights(layers)
    leaves = [weight.requires_grad_() for weight in weights.values()]
    with torch.enable_grad():
        error = _error(probe, dict(fixed) | weights)
        if not bool(error.isfinite()):
            return
        gradients = torch.autograd.grad(error, leaves, torch.full_like(error, factor), allow_unused=True)
    if not all(bool(one.isfinite().all()) for one in gradients if one is not None):  # NaN would stay in the means
        return
    for layer, gradient in zip(layers, gradients, strict=True):
        if gradient is not None:  # of an expert that no token of this batch reached there is none
            layer.move(gradient, rate)


def _error(probe: Probe, substitutes: Mapping[tuple[nn.Module, str], Tensor]) -> Tensor:
    """Average the squared error of the output's rows, each by its row's own size: a norm that follows divides by that."""
    total, parts = torch.zeros(()), 0
    for output, wanted in zip(probe.output(substitutes), probe.reference, strict=True):
        if not wanted.numel() or not wanted.dim():  # a scalar, such as a loss, has no rows
            continue
        if output.shape != wanted.shape:
            raise RuntimeError(f"the block returned shape {tuple(output.shape)}, then {tuple(wanted.shape)}")
        difference, target = _apart(output.float(), wanted.float())
        error = difference.square().mean(-1)
        total, parts = total.to(error) + (error / _sizes(target)).mean(), parts + 1
    return total / max(parts, 1)


def _apart(output: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``output - wanted`` and ``wanted``, with 0 where a mask has put inf or -inf into both."""
    difference = output - wanted
    if bool(wanted.isfinite().all()):
        return difference, wanted
    masked = wanted.isinf() & (output == wanted)
    return difference.masked_fill(masked, 0), wanted.masked_fill(masked, 0)


def _sizes(rows: Tensor) -> Tensor:
    """Return the mean square of each row, or ``_LEAST_SIZE`` of the median of those that are not 0, if that is more."""
    sizes = rows.square().mean(-1)
    some = sizes[sizes > 0]
    least = float(some.median()) * _LEAST_SIZE if some.numel() else 0.0
    return sizes.clamp_min(max(least, torch.finfo(torch.float32).tiny))


def _judge(probes: Sequence[Probe], substitutes: Mapping[tuple[nn.Module, str], Tensor]) -> float:
    return sum(float(_error(probe, substitutes)) for probe in probes) / len(probes)
