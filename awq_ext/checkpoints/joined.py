"""Take apart and put together tensors that one side, files or memory, has joined: the names of their parts, and their rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from .formats import CheckpointError, PackedLinear


@dataclass
class Part:
    """A part of a joined tensor: its name, the pattern of the converter that it fits, and its rows.

    sources: what it consists of -> rows of each; empty for a float tensor that is converted as it is. stacked: they are experts
    of one tensor.
    """

    name: str
    pattern: str
    sources: dict[str, int] = field(default_factory=dict)
    stacked: bool = False


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Make a sort key by which expert 2 comes before expert 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def absent_experts(parts: Iterable[Part], count: int = 0) -> list[str]:
    """Name the experts that are missing among ``parts``, of 0 to the highest number there, or of ``count``."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for part in parts:
        pattern = re.sub(r"\\?\*\\?\.", r"(\\d+)\\.", part.pattern, count=1)
        if "*" in part.pattern and (match := re.search(pattern, part.name)) and match.lastindex == 1:
            around = (part.pattern, part.name[: match.start(1)], part.name[match.end(1) :])
            found.setdefault(around, set()).add(int(match[1]))
    count = max([count, *(number + 1 for numbers in found.values() for number in numbers)], default=0)
    return [f"{a}{e}{b}" for (_, a, b), numbers in found.items() for e in range(count) if e not in numbers]


@dataclass(frozen=True)
class Run:
    """Rows ``start`` to ``stop`` (None: to the end) of what is called ``source``."""

    source: str
    start: int = 0
    stop: int | None = None


class RowNumbers:
    """Stand-ins for weights [N, K] that a conversion of unknown kind is applied to: it shows where it puts their rows.

    rows: N by name. Every row of every weight has a number of its own, and two columns that tell rows from columns.
    """

    def __init__(self, rows: Mapping[str, int]) -> None:
        self._rows = dict(rows)
        self._starts = dict(zip(rows, accumulate(rows.values(), initial=0), strict=False))

    def of(self, source: str) -> Tensor:
        """int64 [N, 2]."""
        first = 2 * self._starts[source]
        return torch.arange(first, first + 2 * self._rows[source]).view(-1, 2)

    def runs(self, weight: Tensor) -> tuple[Run, ...] | None:
        """Tell which rows stand in ``weight`` [n, 2], a result of the conversion; None if these are not whole rows."""
        if weight.dim() != 2 or weight.shape[1] != 2 or not len(weight):
            return None
        first = weight[:, 0]
        if (first % 2).any() or (weight[:, 1] != first + 1).any():
            return None
        numbers = first // 2
        starts = torch.tensor(list(self._starts.values()))
        home = torch.bucketize(numbers, starts, right=True) - 1
        breaks = torch.nonzero((numbers.diff() != 1) | (home.diff() != 0)).flatten() + 1
        names = list(self._rows)
        runs = []
        for low, high in pairwise([0, *breaks.tolist(), len(numbers)]):
            name = names[home[low]]
            start = int(numbers[low]) - self._starts[name]
            runs.append(Run(name, start, start + high - low))
        return tuple(runs)


def cut_layer(layer: PackedLinear, run: Run) -> PackedLinear:
    """Cut out the outputs ``run.start`` to ``run.stop``, exactly. CheckpointError when the layer has fewer."""
    if (run.start, run.stop) == (0, None):
        return layer
    if run.stop is not None and run.stop > layer.out_features:
        raise CheckpointError(f"{run.source} has {layer.out_features} outputs, {run.stop} are needed")
    rows = slice(run.start, run.stop)
    return replace(
        layer,
        qweight=layer.qweight[rows],
        scales=layer.scales[rows],
        zeros=layer.zeros[rows],
        bias=None if layer.bias is None else layer.bias[rows],
        # every part has its own: no file can hold one tensor under two names
        pre_quant_scale=None if layer.pre_quant_scale is None else layer.pre_quant_scale.clone(),
    )


def join_layers(layers: Sequence[PackedLinear], names: Sequence[str]) -> PackedLinear:
    """Make one layer with the outputs of all, exactly. names: of the parts, for messages.

    CheckpointError when they differ in input channels, bits, groups, run-time scales, or in having a bias.
    """
    first = layers[0]
    if len(layers) == 1:
        return first
    for name, layer in zip(names, layers, strict=True):
        if reason := _difference(first, layer):
            raise CheckpointError(f"{names[0]} and {name} are one layer in the model, but have different {reason}")
    return replace(
        first,
        qweight=torch.cat([layer.qweight for layer in layers]),
        scales=torch.cat([layer.scales for layer in layers]),
        zeros=torch.cat([layer.zeros for layer in layers]),
        bias=None if first.bias is None else torch.cat([layer.bias for layer in layers]),
    )


def _difference(one: PackedLinear, other: PackedLinear) -> str:
    """Tell in what two layers differ that a joined one has only once, or ""."""
    if one.in_features != other.in_features:
        return f"input channels ({one.in_features}, {other.in_features})"
    if one.bits != other.bits:
        return f"bits ({one.bits}, {other.bits})"
    if one.compute != other.compute:
        return f"activations ({one.compute}, {other.compute})"
    # a single group may be called -1 or by its length
    if one.groups != other.groups or (one.groups > 1 and one.group_size != other.group_size):
        return f"group sizes ({one.group_size}, {other.group_size})"
    scales = (one.pre_quant_scale, other.pre_quant_scale)
    if (scales[0] is None) != (scales[1] is None) or (scales[0] is not None and not torch.equal(*scales)):
        return "run-time scales (pre_quant_scale)"
    return "biases: only one has any" if (one.bias is None) != (other.bias is None) else ""


def checked_runs(source: Any, name: str, runs: tuple[Run, ...] | None, parts: Sequence[Part]) -> tuple[Run, ...]:
    """Return the rows that ``name`` is made of, if all are quantized or all alike. CheckpointError where they are not."""
    if runs is None:
        raise CheckpointError(
            f"{parts[0].name} is quantized, and {name} is not made of its rows, so that its groups cannot be kept"
        )
    quantized = [run.source for run in runs if run.source in source.layers]
    left = [run.source for run in runs if run.source not in source.layers]
    if quantized and left:
        raise CheckpointError(
            f"{quantized[0]} is quantized, {left[0]} is not, and both are one layer on the other side: {name}"
        )
    kinds = {(source.shape(each)[1:], source.dtype(each)) for each in left}
    if len(kinds) > 1:
        raise CheckpointError(f"{left[0]} and {left[-1]} are one layer, but differ in input channels or dtype: {name}")
    return runs
