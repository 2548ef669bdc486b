"""What solving found for a Linear and for a scale group, and the module that takes the Linear's place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..calibration.centred import KEPT
from ..calibration.channels import channel_salience, tail, top_share
from ..folding.fold import Change, Fold, NormFold
from ..layers.quant_linear import QuantLinear
from ..layers.quantized_weight import QuantizedWeight
from ..modules import take_hooks
from ..reporting.report import LayerReport
from .bias import corrected, mean_error
from .scales import ScaleChoice
from .tasks import NO_ROWS, GroupTask, LayerTask

# Searching around the mean saves about this share of what is left after the correction (docs/research.md, "Linears with a bias").
COARSE = 0.1


@dataclass(frozen=True, eq=False)
class Unclipped:
    """What a layer with clipped ranges is with full ones, made when it is asked for.

    solve: makes the solution. sketches: makes quick likenesses of the clipped solution and of this one, without losses, that differ
    from each other as the two do; None where the solution itself is at hand.
    """

    solve: Callable[[], LayerSolution]
    sketches: Callable[[], tuple[LayerSolution, LayerSolution]] | None = None


@dataclass(frozen=True, eq=False)
class LayerSolution:
    """The codes that replace a Linear's weight, and their loss (mean squared output error per calibration row).

    scale: fp32 [K], by which columns were multiplied before rounding. divisor: fp32 [N], by which rows were divided, where a later
    group's scale is folded into this Linear. loss_rtn: the loss of rounding to nearest. limit: the same once the bias takes over
    RTN's mean error; ``loss`` must not exceed it. All three losses are None for a task with a problem.
    gptq: whether the codes come from error feedback. corrects_bias: whether the bias takes over the mean error. bias_shift: what
    is added to the bias, fp64 [N], once the codes are final. unclipped: where ranges are clipped, the way to full ones.
    """

    task: LayerTask
    found: QuantizedWeight
    scale: Tensor | None = None
    divisor: Tensor | None = None
    loss: float | None = None
    limit: float | None = None
    loss_rtn: float | None = None
    gptq: bool = False
    corrects_bias: bool = False
    unclipped: Unclipped | None = None
    bias_shift: Tensor | None = None

    @property
    def method(self) -> str:
        """The method in effect: the one in the settings, but without error feedback where that did not lower the loss."""
        settings = self.task.settings
        if self.task.problem:
            return "rtn"
        if settings.uses_gptq and not self.gptq:
            return "awq" if settings.searches_scale else "rtn"
        return settings.method

    @property
    def worse_than_rtn(self) -> bool:
        """Whether it loses more than rounding to nearest."""
        return self.loss is not None and self.loss > self.limit

    @property
    def seldom_called(self) -> bool:
        """Whether its problem is that few calibration rows reached it, or none."""
        return self.task.problem == NO_ROWS or "min_tokens" in self.task.problem

    @property
    def clipped(self) -> bool:
        """Whether the codes come from clipped ranges."""
        return self.unclipped is not None

    def weight(self) -> Tensor:
        """Dequantize the codes to the original space (scales undone, so no fold is needed): fp32 [N, K]."""
        return self.found.dequantize(self.scale, self.divisor)

    def substitutes(self) -> dict[tuple[nn.Module, str], Tensor]:
        """Compute the parameters that the Linear has with these codes, before any fold, in its dtypes."""
        linear, weight = self.task.linear, self.weight()
        found: dict[tuple[nn.Module, str], Tensor] = {(linear, "weight"): weight.to(linear.weight.dtype)}
        if self.corrects_bias:
            bias = linear.bias.detach()
            shift, _ = corrected(bias, self._mean_error(weight))
            found[linear, "bias"] = (bias.double() + shift).to(bias.dtype)
        return found

    def _mean_error(self, weight: Tensor) -> Tensor:
        return mean_error(self.task.weight, weight, self.task.input.mean)

    @property
    def bias_too_coarse(self) -> bool:
        """Whether the bias cannot hold the mean error that a search around the mean left to it."""
        if not (self.corrects_bias and self.task.centred):
            return False
        error = self._mean_error(self.weight())
        _, rest = corrected(self.task.linear.bias.detach(), error)
        given, left = float(error.square().sum()), float(rest.square().sum())
        return self.loss + left > self.loss_rtn or left > COARSE * max(self.loss, given)

    def with_bias_shift(self) -> LayerSolution:
        """Compute what the bias takes over, now that the codes are final, and the loss that is then left."""
        if not self.corrects_bias:
            return self
        error = self._mean_error(self.weight())
        shift, left = corrected(self.task.linear.bias.detach(), error)
        counted = float(error.square().sum()) * (KEPT if self.task.centred else 1.0)
        return replace(self, bias_shift=shift, loss=max(0.0, self.loss - counted) + float(left.square().sum()))

    def changes(self) -> list[Change]:
        """Return the correction of the bias, to be made before a fold divides it."""
        if self.bias_shift is None:
            return []
        return [(self.task.linear, "bias", lambda bias: bias + self.bias_shift.float())]


def substitutes_of(layers: Iterable[LayerSolution]) -> dict[tuple[nn.Module, str], Tensor]:
    """Join what :meth:`LayerSolution.substitutes` gives for each of ``layers``."""
    found: dict[tuple[nn.Module, str], Tensor] = {}
    for layer in layers:
        found |= layer.substitutes()
    return found


@dataclass(frozen=True, eq=False)
class GroupSolution:
    """A solved scale group: its scale, and the fold of 1/s (None: a division at run time, or in fake-quantized weights)."""

    task: GroupTask
    choice: ScaleChoice = field(default_factory=lambda: ScaleChoice(None))
    fold: Fold | None = None
    layers: tuple[LayerSolution, ...] = ()

    def reports(self) -> list[LayerReport]:
        """Make the group's rows of the report."""
        rows = [self._report(layer) for layer in self.layers]
        x_mean = self.task.statistics.x_mean()
        if self.task.statistics.rows and bool(x_mean.isfinite().all()):
            salience = channel_salience(x_mean, [task.weight for task in self.task.layers])
            rows[0].tail, rows[0].top_share = tail(salience), top_share(salience)
        return rows

    @property
    def _applied(self) -> str:
        if self.fold is not None:
            return "norm" if isinstance(self.fold, NormFold) else "linear"
        return "run time" if self.task.settings.packed else "weights"

    def _report(self, layer: LayerSolution) -> LayerReport:
        task, scaled = layer.task, layer.scale is not None
        return LayerReport(
            name=task.name,
            in_features=task.linear.in_features,
            out_features=task.linear.out_features,
            status=f"int{task.settings.bits}" if task.settings.packed else "fake",
            bits=task.settings.bits,
            group_size=task.settings.group_size,
            method=layer.method,
            group=self.task.layers[0].name,
            scale=self.choice.kind if scaled else "identity",
            alpha=self.choice.alpha if scaled else None,
            power=self.choice.power if scaled else 1.0,
            applied=self._applied if scaled and self.choice.scale is not None else "",
            clipped=layer.clipped,
            loss_rtn=layer.loss_rtn,
            loss=layer.loss,
            tokens=task.input.rows,
            bias_corrected=layer.corrects_bias,
            note=task.problem,
        )


@torch.no_grad()
def build_layer(layer: LayerSolution, fold: Fold | None) -> nn.Module:
    """Build the module that takes the Linear's place: a QuantLinear, or for ``packed=False`` a plain Linear."""
    old = layer.task.linear
    if layer.task.settings.packed:
        pre_quant_scale = 1 / layer.scale if layer.scale is not None and fold is None else None
        return QuantLinear.from_packed(old, layer.found, pre_quant_scale)
    linear = nn.Linear(old.in_features, old.out_features, device="meta")
    weight = layer.found.dequantize(layer.scale).to(old.weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
    linear.bias = old.bias
    take_hooks(linear, old)
    return linear.train(old.training)


@torch.no_grad()
def trainable_layer(layer: LayerSolution) -> QuantLinear:
    """Build a layer that computes what a fake-quantized Linear does, and whose scales can be trained: its codes as 8 bits."""
    found = layer.found
    wide = QuantizedWeight(found.codes(), found.scales, found.zeros, found.in_features, found.group_size, bits=8)
    pre_quant_scale = None if layer.scale is None else 1 / layer.scale
    return QuantLinear.from_packed(layer.task.linear, wide, pre_quant_scale)


@torch.no_grad()
def fake_quantized(layer: QuantLinear, requires_grad: bool) -> nn.Linear:
    """Build the plain Linear that computes what ``layer``, of ``trainable_layer``, does."""
    linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
    linear.weight = nn.Parameter(layer.weight.as_subclass(Tensor), requires_grad=requires_grad)
    linear.bias = layer.bias
    take_hooks(linear, layer)
    return linear.train(layer.training)
