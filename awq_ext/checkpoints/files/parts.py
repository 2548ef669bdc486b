"""Make the tensors of a checkpoint from its source, part by part: a float tensor, or all of a quantized layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..formats import Layout, PackedLinear, Summary

# the layer's name and the layer ("" and None for a float tensor), and what is stored of it, by full names
Part = tuple[str, PackedLinear | None, dict[str, Tensor]]


def parts(source: Any, layout: Layout, summary: Summary) -> Iterator[Part]:
    """Make the tensors to store of a ``write.Source``, under their names; those of one layer together, and with it."""
    for name in source.floats:
        yield "", None, {name: source.float_tensor(name)}
    for name in source.layers:
        # held by no variable here: one layer goes before the next one comes
        yield _part(name, source, layout, summary)


def _part(name: str, source: Any, layout: Layout, summary: Summary) -> Part:
    tied = {} if summary.in_memory is None else summary.in_memory.tied
    layer = source.layer(name)
    named = {f"{name}.{suffix}".lstrip("."): tensor for suffix, tensor in layout.pack(layer, summary).items()}
    stored = {full: tensor for full, tensor in named.items() if full not in tied}
    # of a layer under a second name the native layout's empty weight would be left
    return name, layer, stored if any(tensor.numel() for tensor in stored.values()) else {}
