"""What solving a block found for its layers and groups, and the module that each Linear becomes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..calibration.channels import channel_salience, tail, top_share
from ..calibration.statistics import GroupStatistics, InputStatistics
from ..config import AwqConfig
from ..folding.fold import Change, Fold, NormFold
from ..kernels import kernels_for
from ..layers.quant_linear import QuantLinear
from ..modules import take_hooks
from ..reporting.report import LayerReport
from ..survey.groups import ScaleGroup
from .bias import KEPT, corrected, mean_error
from .codes import Codes
from .scales import ScaleChoice

NO_ROWS = "no calibration row reached it"
# Searching around the mean saves about this share of what is left after the correction (docs/quality.md, "Linears with a bias").
COARSE = 0.1


@dataclass
class LayerSolution:
    """A Linear, its settings and the codes that replace its weight; ``scale`` fp32 [K] multiplied the columns before rounding.

    divisor: fp32 [N], by which the rows were divided, where a later group's scale is folded into this Linear.
    book: statistics of its input; problem: why they were not used. unclipped: the codes without clipping, where there is a choice.
    unclipped_loss: what ``loss`` would be with those. fed_back: whether ``codes`` were rounded with error feedback.
    loss_rtn: of rounding to nearest; limit: of the same codes once the bias takes over their mean error: the loss never exceeds it.
    corrected: whether its bias takes over the mean of its error; shift: what is added to it then, fp64 [N].
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
    limit: float | None = None
    loss: float | None = None
    problem: str = ""
    fed_back: bool = False
    corrected: bool = False
    shift: Tensor | None = None

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

    def weight(self, codes: Codes) -> Tensor:
        """What ``codes`` stand for in the original space (scales undone, so no fold is needed): fp32 [N, K]."""
        kernels = kernels_for(self.linear.weight.device)
        return codes.dequantize(kernels, self.settings.group_size, self.scale, self.divisor)

    def substitutes(self, codes: Codes) -> dict[tuple[nn.Module, str], Tensor]:
        """The parameters that the Linear would have with these codes, before any fold, in its dtypes."""
        weight = self.weight(codes)
        found: dict[tuple[nn.Module, str], Tensor] = {(self.linear, "weight"): weight.to(self.linear.weight.dtype)}
        if self.corrected:
            bias = self.linear.bias.detach()
            shift, _ = corrected(bias, self._mean_error(weight))
            found[self.linear, "bias"] = (bias.double() + shift).to(bias.dtype)
        return found

    def _mean_error(self, weight: Tensor) -> Tensor:
        return mean_error(self.linear.weight.detach(), weight, self.book.mean)

    @property
    def too_coarse(self) -> bool:
        """Whether its bias cannot hold the mean error that the search left to it."""
        if not (self.corrected and self.book.centred):
            return False
        error = self._mean_error(self.weight(self.codes))
        given, left = (float(part.square().sum()) for part in (error, corrected(self.linear.bias.detach(), error)[1]))
        return self.loss + left > self.loss_rtn or left > COARSE * max(self.loss, given)

    def settle(self) -> None:
        """Once ``codes`` are final: what the bias takes over of the mean error, and the loss that this really leaves."""
        if self.corrected:
            error = self._mean_error(self.weight(self.codes))
            self.shift, left = corrected(self.linear.bias.detach(), error)
            counted = float(error.square().sum()) * (KEPT if self.book.centred else 1.0)
            self.loss = max(0.0, self.loss - counted) + float(left.square().sum())

    def changes(self) -> list[Change]:
        """The correction of the bias, to be made before a fold divides it."""
        return [] if self.shift is None else [(self.linear, "bias", lambda bias: bias + self.shift.float())]

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
                bias_corrected=layer.corrected,
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
