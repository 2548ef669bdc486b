"""Rounding of one Linear: to nearest, or with error feedback and clipped ranges where they lower its loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration.centred import KEPT
from ..layers.quantized_weight import QuantizedWeight
from .bias import mean_error
from .codes import RowLosses, round_to_nearest, row_losses, search_clip, spread_rows
from .gptq import Quantizer
from .solution import LayerSolution
from .tasks import LayerTask


def rounded(task: LayerTask, scale: Tensor | None = None, divisor: Tensor | None = None) -> LayerSolution:
    """Round to nearest under the given scale and divisor. A task with a problem gets no losses."""
    found = round_to_nearest(divided(task.weight, divisor), task.settings, scale)
    solution = LayerSolution(task, found, scale, divisor)
    if task.problem:
        return solution
    # the bias takes nothing over here, so the plain second moment counts
    losses = row_losses(task.weight, found, task.input.second_moment, scale, divisor)
    loss = _mean(task, losses)
    return replace(solution, loss=loss, limit=loss, loss_rtn=loss)


def searched(task: LayerTask, quantizer: Quantizer, divisor: Tensor | None = None) -> LayerSolution:
    """Round under the scale of ``quantizer``, with the error feedback and clips that are set, where these lower the loss."""
    job = _Job(task, quantizer, divisor)
    rtn = round_to_nearest(task.weight, task.settings)
    plain = row_losses(task.weight, rtn, task.second_moment, damping=job.damping)
    nearest = _Trial(rtn, plain, _mean(task, plain))
    limit = loss_rtn = nearest.loss
    if task.centred:
        # RTN leaves the bias as it is, so its loss includes the mean error, which the moment around the mean leaves out
        mean = mean_error(task.weight, rtn.dequantize(), task.input.mean)
        loss_rtn += float(mean.square().sum()) * (1 - KEPT)
    best = job.nearest(nearest)
    if task.settings.uses_gptq:
        best = job.with_gptq(best, limit)
    solution = LayerSolution(
        task, best.found, quantizer.scale, divisor, best.loss, limit, loss_rtn, best.gptq, task.corrects_bias
    )
    clipped = None if task.settings.clip is False else job.clipped(best, limit)
    return (
        solution if clipped is None else replace(solution, found=clipped.found, loss=clipped.loss, unclipped=solution)
    )


def loss_after_gptq(task: LayerTask, rows: Tensor, quantizer: Quantizer) -> float:
    """Estimate from some output ``rows`` the squared output error that error feedback leaves, summed over the calibration rows.

    Codes are not refined: that ranks scales no better (docs/research.md) and would take as long again.
    """
    weight = task.weight[rows]
    found = quantizer.gptq(weight, task.settings, refined=False)
    losses = row_losses(weight, found, quantizer.second_moment, quantizer.scale)
    return float(losses.plain.sum()) * len(task.weight) / len(rows)


@dataclass(frozen=True, eq=False)
class _Trial:
    """Candidate codes and their losses."""

    found: QuantizedWeight
    losses: RowLosses
    loss: float
    gptq: bool = False


@dataclass(frozen=True, eq=False)
class _Job:
    """A Linear to be rounded under one scale and divisor."""

    task: LayerTask
    quantizer: Quantizer
    divisor: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The weight as it is rounded: [N, K]."""
        return divided(self.task.weight, self.divisor)

    @property
    def damping(self) -> float:
        """Damping of the losses that decide on clips; 0 without error feedback."""
        return self.task.settings.damping if self.task.settings.uses_gptq else 0.0

    def losses(self, found: QuantizedWeight, rows: Tensor | None = None) -> RowLosses:
        """Compute squared output errors in the space of the original weight, of all output rows or of some."""
        weight, divisor = self.task.weight, self.divisor
        if rows is not None:
            weight, found = weight[rows], found.rows(rows)
            divisor = None if divisor is None else divisor[rows]
        return row_losses(weight, found, self.task.second_moment, self.quantizer.scale, divisor, self.damping)

    def trial(self, found: QuantizedWeight, gptq: bool = False) -> _Trial:
        losses = self.losses(found)
        return _Trial(found, losses, _mean(self.task, losses), gptq)

    def nearest(self, rtn: _Trial) -> _Trial:
        """Round to nearest under the scale, then fit the scales of the weight groups.

        The fit minimizes a damped loss; where it loses to ``rtn`` without damping, it is not used. Nor are the scales fitted
        where GPTQ refines them later.
        """
        settings = self.task.settings
        scaled = self.quantizer.scale is not None or self.divisor is not None
        if settings.refine and not settings.uses_gptq:
            trial = self.trial(self.quantizer.nearest(self.weight, settings))
            if trial.loss <= rtn.loss:
                return trial
        return self.trial(self.quantizer.nearest(self.weight, settings, fitted=False)) if scaled else rtn

    def with_gptq(self, best: _Trial, limit: float) -> _Trial:
        """Round with error feedback, and take that if it loses less than rounding to nearest."""
        trial = self.trial(self.quantizer.gptq(self.weight, self.task.settings), gptq=True)
        return trial if trial.loss < min(best.loss, limit) else best

    def clipped(self, best: _Trial, limit: float) -> _Trial | None:
        """Round to clipped ranges; None unless they lose less than ``best`` on ``search_rows`` rows, and no more than ``limit``.

        The ranges are searched on diagonal blocks of the second moment, while this comparison uses all of it. With error feedback
        both are damped like the feedback itself.
        """
        settings, weight = self.task.settings, self.weight
        second_moment = self.quantizer.damped(settings.damping) if best.gptq else self.task.second_moment
        clip = search_clip(weight, second_moment, settings, self.quantizer.scale)
        found = (self.quantizer.gptq if best.gptq else self.quantizer.nearest)(weight, settings, clip)
        rows = spread_rows(len(weight), settings.search_rows, weight.device)
        losses = self.losses(found, rows)
        if not self._judged(losses, rows, best.gptq) < self._judged(best.losses.at(rows), rows, best.gptq):
            return None
        others = torch.ones(len(weight), dtype=torch.bool, device=weight.device).index_fill_(0, rows, False)
        rest = others.nonzero()[:, 0]
        every = torch.cat([losses.plain, self.losses(found, rest).plain])
        # in the order of the rows, so that the sum is that of all rows taken at once
        ordered = torch.empty_like(every).index_copy_(0, torch.cat([rows, rest]), every)
        loss = float(ordered.sum()) / self.task.input.rows
        return _Trial(found, losses, loss, best.gptq) if loss <= limit else None

    def _judged(self, losses: RowLosses, rows: Tensor, damped: bool) -> float:
        """Sum the losses of ``rows`` in the space in which these are rounded; this sum decides on a clip."""
        values = losses.damped if damped else losses.plain
        return float((values if self.divisor is None else values / self.divisor[rows].double().square()).sum())


def divided(weight: Tensor, divisor: Tensor | None) -> Tensor:
    """Divide the rows of ``weight`` [N, K] by ``divisor`` fp32 [N]; None leaves them as they are."""
    return weight if divisor is None else weight.float() / divisor[:, None]


def _mean(task: LayerTask, losses: RowLosses) -> float:
    """Compute the mean squared output error per calibration row, summed over all output rows."""
    return float(losses.plain.sum()) / task.input.rows
