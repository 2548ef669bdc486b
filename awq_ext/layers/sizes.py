"""Count the bytes of a model, quantized layers as they are packed."""

from __future__ import annotations

from torch import nn

from ..reporting.report import AwqReport
from ..reporting.sizes import linear_bytes
from .quant_linear import QuantLinear


def model_bytes(model: nn.Module, float_bytes: int | None = None, report: AwqReport | None = None) -> int:
    """Count the bytes of parameters and buffers: quantized layers as they are, fake-quantized ones as if packed, the rest by dtype.

    float_bytes: bytes of each of the rest instead, for weights that are held wider than they are stored.
    report: tells which layers are fake-quantized; None is the model's own.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    report = getattr(model, "awq_report", None) if report is None else report
    fake = {row.name: row for row in report.layers if row.status == "fake"} if isinstance(report, AwqReport) else {}
    total = sum(module.nbytes for module in packed.values())
    total += sum(linear_bytes(row) for row in fake.values())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if owner not in packed and not (owner in fake and leaf == "weight"):
            total += tensor.numel() * (float_bytes or tensor.element_size())
    return total
