"""Rounding one Linear: to nearest, or with error feedback and clipped ranges where they lower its loss."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from ..calibration.statistics import InputStatistics
from ..config import AwqConfig
from .bias import KEPT, mean_error
from .codes import Codes, RowLosses, round_to_nearest, row_losses, search_clip, spread_rows
from .gptq import Feedback
from .solution import LayerSolution


class Rounding:
    """What rounds the Linears of a block, one at a time. Reads them, never writes them."""

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels

    def nearest(
        self,
        name: str,
        linear: nn.Linear,
        settings: AwqConfig,
        book: InputStatistics,
        scale: Tensor | None = None,
        divisor: Tensor | None = None,
        problem: str = "",
    ) -> LayerSolution:
        """To nearest, by the given scale and divisor (:class:`LayerSolution`); a ``problem`` leaves it without losses."""
        codes = round_to_nearest(self._kernels, divided(linear.weight.detach(), divisor), settings, scale)
        layer = LayerSolution(name, linear, settings, book, codes, scale, divisor, problem=problem)
        if not problem:
            layer.loss = layer.limit = layer.loss_rtn = _mean(layer, self._losses(layer, layer.codes))
        return layer

    def searched(
        self,
        name: str,
        linear: nn.Linear,
        settings: AwqConfig,
        book: InputStatistics,
        feedback: Feedback,
        divisor: Tensor | None = None,
    ) -> LayerSolution:
        """By the scale of ``feedback``: fed back and clipped as ``settings`` want and the losses allow.

        A ``book`` around the mean is that of a Linear whose bias takes over the mean's error.
        """
        weight, scale = linear.weight.detach(), feedback.scale
        layer = LayerSolution(name, linear, settings, book, round_to_nearest(self._kernels, weight, settings))
        layer.limit = layer.loss_rtn = _mean(layer, plain := self._losses(layer, layer.codes))
        if book.centred:
            own = mean_error(weight, layer.weight(layer.codes), book.mean)
            layer.loss_rtn += float(own.square().sum()) * (1 - KEPT)
        layer.scale, layer.divisor = scale, divisor
        losses = self._round_to_nearest(layer, plain, feedback)
        if settings.feeds_back:
            losses = self._feed_back(layer, losses, feedback)
        if settings.clip is not False:
            self._clip(layer, losses, feedback)
        return layer

    def loss_after_feedback(self, linear: nn.Linear, settings: AwqConfig, rows: Tensor, feedback: Feedback) -> float:
        """Squared output error over the calibration rows that error feedback would leave, estimated on some output ``rows``.

        Before refining, which ranks scales no better (docs/quality.md) and would take as long again.
        """
        weight = linear.weight.detach()[rows]
        codes = feedback.quantize(weight, settings, refined=False)
        losses = row_losses(self._kernels, weight, codes, feedback.scale, feedback.second_moment, settings.group_size)
        return float(losses.plain.sum()) * len(linear.weight) / len(rows)

    def _round_to_nearest(self, layer: LayerSolution, plain: RowLosses, feedback: Feedback) -> RowLosses:
        """Give ``layer`` codes by its scale, the scales of its groups fitted; ``plain``: the losses of the codes it has, RTN's.

        The fit is damped, so that undamped it may lose to RTN: then without. Nor where error feedback will refine them anyway.
        """
        weight, settings = divided(layer.linear.weight.detach(), layer.divisor), layer.settings
        rtn, scaled = layer.codes, layer.scale is not None or layer.divisor is not None
        for fitted in (True, False) if settings.refine and not settings.feeds_back else (False,):
            layer.codes, losses = rtn, plain
            if fitted or scaled:
                layer.codes = feedback.nearest(weight, settings, fitted=fitted)
                losses = self._losses(layer, layer.codes)
            layer.loss = _mean(layer, losses)
            if layer.loss <= layer.limit:
                break
        return losses

    def _feed_back(self, layer: LayerSolution, losses: RowLosses, feedback: Feedback) -> RowLosses:
        """Give ``layer`` codes rounded with error feedback, if their loss is below that of rounding to nearest."""
        codes = feedback.quantize(divided(layer.linear.weight.detach(), layer.divisor), layer.settings)
        fed = self._losses(layer, codes)
        if (loss := _mean(layer, fed)) < min(layer.loss, layer.limit):
            layer.codes, layer.loss, layer.fed_back = codes, loss, True
            return fed
        return losses

    def _clip(self, layer: LayerSolution, losses: RowLosses, feedback: Feedback) -> None:
        """Give ``layer`` codes of clipped ranges, if their output error is below that of the full ranges (on the search's rows).

        The ranges are searched on diagonal blocks of the second moment; here all of it counts. With error feedback both are
        damped like the feedback itself. ``losses``: those of the full ranges.
        """
        settings = layer.settings
        weight = divided(layer.linear.weight.detach(), layer.divisor)
        second_moment = feedback.damped(settings.damping) if layer.fed_back else layer.book.stats.second_moment()
        clip = search_clip(self._kernels, weight, second_moment, settings, layer.scale)
        codes = (feedback.quantize if layer.fed_back else feedback.nearest)(weight, settings, clip)
        rows = spread_rows(len(weight), settings.search_rows, weight.device)
        clipped = self._losses(layer, codes, rows)
        if not _judged(layer, clipped, rows) < _judged(layer, losses.at(rows), rows):
            return
        rest = (
            torch.ones(len(weight), dtype=torch.bool, device=weight.device).index_fill_(0, rows, False).nonzero()[:, 0]
        )
        every = torch.cat([clipped.plain, self._losses(layer, codes, rest).plain])
        # in the order of the rows, so that the sum is that of all rows taken at once
        loss = float(torch.empty_like(every).index_copy_(0, torch.cat([rows, rest]), every).sum()) / layer.book.rows
        if loss <= layer.limit:
            layer.codes, layer.unclipped = codes, layer.codes
            layer.loss, layer.unclipped_loss = loss, layer.loss

    def _losses(self, layer: LayerSolution, codes: Codes, rows: Tensor | None = None) -> RowLosses:
        """Squared output errors in the space of the original weight, of all output rows or of some."""
        weight, divisor = layer.linear.weight.detach(), layer.divisor
        if rows is not None:
            weight, codes = weight[rows], codes.rows(rows)
            divisor = None if divisor is None else divisor[rows]
        damping = layer.settings.damping if layer.settings.feeds_back else 0.0
        moment, group_size = layer.book.stats.second_moment(), layer.settings.group_size
        return row_losses(self._kernels, weight, codes, layer.scale, moment, group_size, divisor, damping)


def divided(weight: Tensor, divisor: Tensor | None) -> Tensor:
    """The weight [N, K] as it is rounded where ``divisor`` fp32 [N] is taken out of its rows."""
    return weight if divisor is None else weight.float() / divisor[:, None]


def _mean(layer: LayerSolution, losses: RowLosses) -> float:
    """Mean squared output error a calibration row, over all output rows."""
    return float(losses.plain.sum()) / layer.book.rows


def _judged(layer: LayerSolution, losses: RowLosses, rows: Tensor) -> float:
    """What decides on a clip: the sum over ``rows`` in the space in which they are rounded."""
    values = losses.damped if layer.fed_back else losses.plain
    return float((values if layer.divisor is None else values / layer.divisor[rows].double().square()).sum())
