"""What solving a block found for its layers and groups, and the module that each Linear becomes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .backend import kernels_for
from .calibrate import GroupStatistics, InputStatistics
from .channels import channel_salience, tail, top_share
from .config import AwqConfig
from .fold import Fold, NormFold
from .groups import ScaleGroup
from .qlinear import QuantLinear, take_hooks
from .report import LayerReport
from .search import Codes, ScaleChoice

NO_ROWS = "no calibration row reached it"


@dataclass
class LayerSolution:
    """A Linear, its settings and the codes that replace its weight; ``scale`` fp32 [K] multiplied the columns before rounding.

    divisor: fp32 [N], by which the rows were divided, where a later group's scale is folded into this Linear.
    book: statistics of its input; problem: why they were not used. unclipped: the codes without clipping, where there is a choice.
    unclipped_loss: what ``loss`` would be with those. fed_back: whether ``codes`` were rounded with error feedback.
    """

    name: str
    linear: nn.Linear
    settings: AwqConfig
    book: InputStatistics
    codes: Codes
    scale: Tensor | None = None
    divisor: Tensor | None = None
    unclipped: Codes | None = None
    unclipped_loss: float | None = None
    loss_rtn: float | None = None
    loss: float | None = None
    problem: str = ""
    fed_back: bool = False

    @property
    def method(self) -> str:
        """What was really done: the wanted method, without the error feedback where that did not lower the loss."""
        if self.problem:
            return "rtn"
        if self.settings.feeds_back and not self.fed_back:
            return "awq" if self.settings.searches_scale else "rtn"
        return self.settings.method

    @property
    def seldom_called(self) -> bool:
        """Whether its problem is that few calibration rows reached it, or none."""
        return self.problem == NO_ROWS or "min_tokens" in self.problem

    @property
    def clipped(self) -> bool:
        """Whether ``codes`` come from clipped ranges."""
        return self.unclipped is not None


@dataclass
class GroupSolution:
    """A scale group: its statistics, its choice, and what takes 1/s (None: division at run time, or in fake-quantized weights)."""

    group: ScaleGroup
    book: GroupStatistics
    choice: ScaleChoice = field(default_factory=lambda: ScaleChoice(None))
    fold: Fold | None = None
    layers: list[LayerSolution] = field(default_factory=list)

    def reports(self) -> list[LayerReport]:
        """The rows of the report."""
        applied = ""
        if self.choice.scale is not None:
            applied = "run time" if self.layers[0].settings.packed else "weights"
            if self.fold is not None:
                applied = "norm" if isinstance(self.fold, NormFold) else "linear"
        rows = [
            LayerReport(
                name=layer.name,
                in_features=layer.linear.in_features,
                out_features=layer.linear.out_features,
                status="int4" if layer.settings.packed else "fake",
                bits=layer.settings.bits,
                group_size=layer.settings.group_size,
                method=layer.method,
                group=self.layers[0].name,
                scale="identity" if layer.scale is None else self.choice.kind,
                alpha=None if layer.scale is None else self.choice.alpha,
                power=1.0 if layer.scale is None else self.choice.power,
                applied="" if layer.scale is None else applied,
                clipped=layer.clipped,
                loss_rtn=layer.loss_rtn,
                loss=layer.loss,
                tokens=layer.book.rows,
                note=layer.problem,
            )
            for layer in self.layers
        ]
        x_mean = self.book.x_mean()
        if self.book.rows and bool(x_mean.isfinite().all()):
            salience = channel_salience(x_mean, [layer.linear.weight.detach() for layer in self.layers])
            rows[0].tail, rows[0].top_share = tail(salience), top_share(salience)
        return rows


@torch.no_grad()
def build_layer(layer: LayerSolution, fold: Fold | None) -> nn.Module:
    """The module that takes the Linear's place: a QuantLinear, or for ``packed=False`` a plain Linear."""
    if not layer.settings.packed:
        linear = nn.Linear(layer.linear.in_features, layer.linear.out_features, device="meta")
        kernels = kernels_for(layer.linear.weight.device)
        weight = layer.codes.dequantize(kernels, layer.settings.group_size, layer.scale).to(layer.linear.weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=layer.linear.weight.requires_grad)
        linear.bias = layer.linear.bias
        take_hooks(linear, layer.linear)
        return linear.train(layer.linear.training)
    pre_quant_scale = 1 / layer.scale if layer.scale is not None and fold is None else None
    parts = (layer.codes.stored, layer.codes.scales, layer.codes.zeros)
    return QuantLinear.from_packed(layer.linear, *parts, layer.settings.group_size, pre_quant_scale)
