"""Rounding of one Linear: to nearest, or with error feedback and clipped ranges where they lower its loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..calibration.centred import KEPT
from ..layers.quantized_weight import QuantizedWeight
from .bias import mean_error
from .codes import RowLosses, round_to_nearest, row_losses, search_clip, spread_rows
from .gptq import Quantizer
from .solution import LayerSolution, Unclipped
from .tasks import LayerTask

_FEWEST_ROWS = 64  # on which clipped and full ranges are compared
# Input channels from which losses are computed fast first: with fewer, other steps take most of the time.
_FEWEST_RANKED = 512


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
    """Round under the scale of ``quantizer``, with the error feedback and clips that are set, where these lower the loss.

    Losses of large Linears are computed fast. Where two are so close that this leaves open which is smaller, all is done again with
    exact ones, so that no choice depends on it.
    """
    if task.weight.shape[1] >= _FEWEST_RANKED:
        with suppress(_Unsure):
            return _searched(_Job(task, quantizer, divisor, ranking=True), task.settings.clip is not False)
    return _searched(_Job(task, quantizer, divisor), task.settings.clip is not False)


def _searched(job: _Job, clips: bool) -> LayerSolution:
    task, quantizer, divisor = job.task, job.quantizer, job.divisor
    rtn = round_to_nearest(task.weight, task.settings)
    plain = row_losses(task.weight, rtn, task.second_moment, damping=job.damping, ranking=job.ranking)
    nearest = _Trial.of(task, rtn, plain)
    limit = loss_rtn = nearest.loss
    if task.centred:
        # RTN leaves the bias as it is, so its loss includes the mean error, which the moment around the mean leaves out
        mean = mean_error(task.weight, rtn.dequantize(), task.input.mean)
        loss_rtn += float(mean.square().sum()) * (1 - KEPT)

    def solution(trial: _Trial, unclipped: Unclipped | None = None) -> LayerSolution:
        trial.loses_less(nearest)  # later it is asked whether ``loss`` is within ``limit``: here that must be sure
        found = (trial.found, quantizer.scale, divisor, trial.loss, limit, loss_rtn, trial.gptq, task.corrects_bias)
        return LayerSolution(task, *found, unclipped)

    if task.settings.uses_gptq:
        best = job.with_gptq(job.nearest(nearest), nearest)
        full = solution(best)
        clipped = job.clipped(nearest, best) if clips else None
        return full if clipped is None else solution(clipped, Unclipped(lambda: full))
    clipped = job.clipped(nearest) if clips else None
    if clipped is None:
        return solution(job.nearest(nearest))

    def unclipped() -> LayerSolution:
        try:
            return solution(job.nearest(nearest))
        except _Unsure:
            return _searched(replace(job, ranking=False), clips=False)

    return solution(clipped, Unclipped(unclipped, partial(_sketches, job, clipped.clip, solution)))


def _sketches(
    job: _Job, clip: Tensor, solution: Callable[[_Trial], LayerSolution]
) -> tuple[LayerSolution, LayerSolution]:
    """Round to nearest with and without clipped ranges, without fitting the scales of the weight groups."""
    weight, settings = job.weight(), job.task.settings
    found = [job.quantizer.nearest(weight, settings, one, fitted=False) for one in (clip, None)]
    clipped, full = (solution(_Trial(one, loss=float("nan"))) for one in found)
    return clipped, full


def loss_after_gptq(task: LayerTask, rows: Tensor, quantizer: Quantizer) -> float:
    """Estimate from some output ``rows`` the squared output error that error feedback leaves, summed over the calibration rows.

    Codes are not refined: that ranks scales no better (docs/research.md) and would take as long again.
    """
    weight = task.weight[rows]
    found = quantizer.gptq(weight, task.settings, refined=False)
    losses = row_losses(weight, found, quantizer.second_moment, quantizer.scale)
    return float(losses.plain.sum()) * len(task.weight) / len(rows)


class _Unsure(Exception):
    """Two ranking losses are so close that exact ones may be the other way round."""


def _less(a: float, b: float, unsure: float) -> bool:
    if unsure and abs(a - b) <= unsure:
        raise _Unsure
    return a < b


@dataclass(frozen=True, eq=False)
class _Trial:
    """Candidate codes and their losses. unsure: by how much ``loss`` may be off. clip: fp32 [N, G], by which ranges are shrunk."""

    found: QuantizedWeight
    loss: float
    unsure: float = 0.0
    losses: RowLosses | None = None
    gptq: bool = False
    clip: Tensor | None = None

    @classmethod
    def of(
        cls, task: LayerTask, found: QuantizedWeight, losses: RowLosses, gptq: bool = False, clip: Tensor | None = None
    ) -> _Trial:
        unsure = float(losses.unsure.sum()) / task.input.rows
        return cls(found, _mean(task, losses), unsure, losses, gptq, clip)

    def loses_less(self, other: _Trial) -> bool:
        """Tell whether it loses less than ``other``; _Unsure where that is open."""
        return self is not other and _less(self.loss, other.loss, max(self.unsure, other.unsure))


@dataclass(frozen=True, eq=False)
class _Job:
    """A Linear to be rounded under one scale and divisor."""

    task: LayerTask
    quantizer: Quantizer
    divisor: Tensor | None
    ranking: bool = False

    def weight(self, rows: Tensor | None = None) -> Tensor:
        """Return the weight as it is rounded, [N, K], or some of its rows, by number."""
        weight, divisor = self.task.weight, self.divisor
        if rows is None:
            return divided(weight, divisor)
        return divided(weight[rows], None if divisor is None else divisor[rows])

    @property
    def damping(self) -> float:
        """Damping of the losses that decide on clips; 0 without error feedback."""
        return self.task.settings.damping if self.task.settings.uses_gptq else 0.0

    def losses(self, found: QuantizedWeight, rows: Tensor | None = None) -> RowLosses:
        """Compute squared output errors in the space of the original weight. found: of all its rows, or of ``rows``."""
        weight, divisor = self.task.weight, self.divisor
        if rows is not None:
            weight, divisor = weight[rows], None if divisor is None else divisor[rows]
        return row_losses(
            weight, found, self.task.second_moment, self.quantizer.scale, divisor, self.damping, self.ranking
        )

    def trial(self, found: QuantizedWeight, gptq: bool = False) -> _Trial:
        return _Trial.of(self.task, found, self.losses(found), gptq)

    def nearest(self, rtn: _Trial) -> _Trial:
        """Round to nearest under the scale, then fit the scales of the weight groups.

        The fit minimizes a damped loss; where it loses to ``rtn`` without damping, it is not used. Nor are the scales fitted
        where GPTQ refines them later.
        """
        settings = self.task.settings
        scaled = self.quantizer.scale is not None or self.divisor is not None
        if settings.refine and not settings.uses_gptq:
            trial = self.trial(self.quantizer.nearest(self.weight(), settings))
            if not rtn.loses_less(trial):
                return trial
        return self.trial(self.quantizer.nearest(self.weight(), settings, fitted=False)) if scaled else rtn

    def with_gptq(self, best: _Trial, rtn: _Trial) -> _Trial:
        """Round with error feedback, and take that if it loses less than rounding to nearest."""
        trial = self.trial(self.quantizer.gptq(self.weight(), self.task.settings), gptq=True)
        return trial if trial.loses_less(best) and trial.loses_less(rtn) else best

    def clipped(self, rtn: _Trial, best: _Trial | None = None) -> _Trial | None:
        """Round to clipped ranges; None unless they lose less than full ones on some rows, and no more than ``rtn``.

        best: the codes with full ranges; None: those rounded to nearest, of which then no other rows are needed. Rows do not
        depend on each other, so what was made to compare is a part of the result.
        """
        gptq, count = best is not None and best.gptq, len(self.task.weight)
        rows = spread_rows(count, self._rows_to_compare, self.task.weight.device)
        clip = self._clip(rows, gptq)
        if best is None:  # both in one call: the second moment is packed once
            ranges = torch.cat([clip, torch.ones_like(clip)])
            found, losses = self._made(rows.repeat(2), ranges)
            chosen = torch.arange(len(rows), device=rows.device)
            full, losses, found = losses.at(chosen + len(rows)), losses.at(chosen), found.rows(chosen)
        else:
            found, losses = self._made(rows, clip, gptq)
            full = best.losses.at(rows)
        if not self._lose_less(losses, full, rows, gptq):
            return None
        if len(rows) < count:
            others = torch.ones(count, dtype=torch.bool, device=rows.device).index_fill_(0, rows, False)
            rest = others.nonzero()[:, 0]
            clip_of_rest = self._clip(rest, gptq)
            found_rest, losses_of_rest = self._made(rest, clip_of_rest, gptq)
            order = torch.cat([rows, rest]).argsort()
            found = QuantizedWeight.joined([found, found_rest]).rows(order)
            clip = torch.cat([clip, clip_of_rest])[order]
            losses = RowLosses.joined([losses, losses_of_rest]).at(order)
        trial = _Trial.of(self.task, found, losses, gptq, clip)
        return None if rtn.loses_less(trial) else trial

    @property
    def _rows_to_compare(self) -> int:
        """Rows on which clipped and full ranges are compared: an eighth, within bounds; 0 means all."""
        wanted = self.task.settings.search_rows
        return min(wanted, max(_FEWEST_ROWS, len(self.task.weight) // 8))

    def _clip(self, rows: Tensor, gptq: bool) -> Tensor:
        """Search for the ranges of some rows: fp32 [rows, G].

        They are searched on diagonal blocks of the second moment, while losses use all of it. With error feedback both are damped
        like the feedback itself.
        """
        settings = self.task.settings
        second_moment = self.quantizer.damped(settings.damping) if gptq else self.task.second_moment
        return search_clip(self.weight(rows), second_moment, settings, self.quantizer.scale)

    def _made(self, rows: Tensor, clip: Tensor | None = None, gptq: bool = False) -> tuple[QuantizedWeight, RowLosses]:
        """Round some rows as the result will be, and measure them."""
        rounding = self.quantizer.gptq if gptq else self.quantizer.nearest
        found = rounding(self.weight(rows), self.task.settings, clip)
        return found, self.losses(found, rows)

    def _lose_less(self, clipped: RowLosses, full: RowLosses, rows: Tensor, damped: bool) -> bool:
        """Compare the sums over ``rows`` in the space in which these are rounded."""

        def total(values: Tensor) -> float:
            return float((values if self.divisor is None else values / self.divisor[rows].double().square()).sum())

        ours, others = (total(one.damped if damped else one.plain) for one in (clipped, full))
        return _less(ours, others, max(total(clipped.unsure), total(full.unsure)))


def divided(weight: Tensor, divisor: Tensor | None) -> Tensor:
    """Divide the rows of ``weight`` [N, K] by ``divisor`` fp32 [N]; None leaves them as they are."""
    return weight if divisor is None else weight.float() / divisor[:, None]


def mean_loss(
    task: LayerTask, found: QuantizedWeight, scale: Tensor | None = None, divisor: Tensor | None = None
) -> float:
    """Compute the loss of codes, as a :class:`LayerSolution` has it."""
    return _mean(task, row_losses(task.weight, found, task.second_moment, scale, divisor))


def _mean(task: LayerTask, losses: RowLosses) -> float:
    """Compute the mean squared output error per calibration row, summed over all output rows."""
    return float(losses.plain.sum()) / task.input.rows
