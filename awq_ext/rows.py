"""Rows: quantized layers made of rows of others, exactly; how experts joined in memory and apart in files become each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .formats import CheckpointError, PackedLinear


@dataclass(frozen=True)
class Numbered:
    """Layers whose rows have numbers, those of the first layer first. sizes: name -> rows."""

    sizes: Mapping[str, int]

    def numbers(self, name: str) -> Tensor:
        """int64 [N, 1]: a stand-in for the layer's weight, which conversions may move about."""
        names = list(self.sizes)
        start = sum(self.sizes[before] for before in names[: names.index(name)])
        return torch.arange(start, start + self.sizes[name])[:, None]

    def parts(self, numbers: Tensor) -> list[tuple[str, Tensor]]:
        """Layer and row for each of ``numbers`` int64 [N, 1], in runs of one layer. CheckpointError if these are no rows."""
        if numbers.dim() != 2 or numbers.shape[1] != 1:
            raise CheckpointError("its weights are turned as well as joined, which cannot be done with quantized ones")
        names = list(self.sizes)
        ends = torch.tensor([self.sizes[name] for name in names]).cumsum(0)
        owners, counts = torch.bucketize(numbers[:, 0], ends, right=True).unique_consecutive(return_counts=True)
        starts = ends - torch.tensor([self.sizes[name] for name in names])
        runs = numbers[:, 0].split(counts.tolist())
        return [(names[owner], run - starts[owner]) for owner, run in zip(owners.tolist(), runs, strict=True)]


def take(parts: Sequence[tuple[str, Tensor]], read: Callable[[str], PackedLinear]) -> PackedLinear:
    """One layer of these rows. CheckpointError where the layers they come from have different inputs or groups."""
    names = list(dict.fromkeys(name for name, _ in parts))
    layers = {name: read(name) for name in names}
    first = layers[names[0]]
    for name, layer in layers.items():
        if (layer.in_features, layer.groups, layer.bias is None) != (
            first.in_features,
            first.groups,
            first.bias is None,
        ):
            raise CheckpointError(f"{names[0]} and {name} make one layer, but have different sizes, groups or biases")
        scales = layer.pre_quant_scale, first.pre_quant_scale
        if (scales[0] is None) != (scales[1] is None) or (scales[0] is not None and not torch.equal(*scales)):
            raise CheckpointError(f"{names[0]} and {name} make one layer, but scale their inputs differently")

    def rows(of: str) -> Tensor:
        return torch.cat([getattr(layers[name], of)[index] for name, index in parts])

    bias = None if first.bias is None else rows("bias")
    return replace(first, qweight=rows("qweight"), scales=rows("scales"), zeros=rows("zeros"), bias=bias)
