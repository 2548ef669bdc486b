"""The size of a model: bytes as they are stored, fake-quantized layers as they would be packed."""

from __future__ import annotations

from torch import nn

from . import reference
from .qlinear import QuantLinear
from .report import AwqReport, LayerReport


def linear_bytes(layer: LayerReport) -> int:
    """Packed size of a Linear: its codes, and for each group of each row a 2-byte scale and a zero of half a byte."""
    groups = reference.group_count(layer.in_features, layer.group_size)
    return -(-layer.out_features * (layer.in_features * layer.bits + 20 * groups) // 8)


def model_bytes(model: nn.Module, float_bytes: int | None = None) -> int:
    """Size of all parameters and buffers: int4 layers as they are, fake-quantized ones as if packed, the rest by its dtype.

    float_bytes: bytes of each of the rest instead, for weights that are held wider than they are stored.
    """
    int4 = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    report = getattr(model, "awq_report", None)
    fake = {row.name: row for row in report.layers if row.status == "fake"} if isinstance(report, AwqReport) else {}
    total = sum(module.nbytes for module in int4.values())
    total += sum(linear_bytes(row) for row in fake.values())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if owner not in int4 and not (owner in fake and leaf == "weight"):
            total += tensor.numel() * (float_bytes or tensor.element_size())
    return total
