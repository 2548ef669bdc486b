"""One block, from statistics to quantized layers: scales, folds, clips, codes. Reads the model, never writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from . import search
from .calibrate import BlockSurvey, GroupStatistics
from .config import AwqConfig
from .fold import NormFold, Probe, Substitutes, prove_norm_fold
from .groups import ScaleGroup
from .report import BlockReport, LayerReport
from .search import Codes, ScaleChoice


@dataclass
class LayerSolution:
    """A Linear and the codes that replace its weight; ``scale`` fp32 [K] multiplied the columns before rounding."""

    name: str
    linear: nn.Linear
    codes: Codes
    scale: Tensor | None
    report: LayerReport

    def weight(self, group_size: int) -> Tensor:
        """The quantized weight in the original space and dtype [N, K]."""
        return self.codes.dequantize(group_size, self.scale).to(self.linear.weight.dtype)


@dataclass
class GroupSolution:
    """A scale group: its choice, and the norm that takes 1/s (None: division at run time)."""

    choice: ScaleChoice
    fold: NormFold | None = None
    layers: list[LayerSolution] = field(default_factory=list)


class BlockSolver:
    """Solves the groups of one block. ``probe`` gives the block's output under substituted parameters."""

    def __init__(
        self,
        surveyed: BlockSurvey,
        books: Sequence[GroupStatistics],
        probe: Probe,
        kernels: ModuleType,
        config: AwqConfig,
        foldable: Mapping[str, nn.Module],
    ) -> None:
        self.surveyed = surveyed
        self.books = books
        self.probe = probe
        self.kernels = kernels
        self.config = config
        self.foldable = foldable
        self.warnings: list[str] = []

    def solve(self) -> tuple[list[GroupSolution], BlockReport]:
        """All groups of the block, and how far its output moved."""
        groups = [self._solve_group(g, b) for g, b in zip(self.surveyed.groups, self.books, strict=True)]
        if self.config.clip == "auto" and self.config.method == "awq":
            self._keep_helpful_clips(groups)
        size = self.probe.norm or 1.0
        fold_error = self.probe.distance(_folded_float(groups)) / size
        report = BlockReport(self.surveyed.block.name, fold_error, self.probe.distance(self._quantized(groups)) / size)
        return groups, report

    def _solve_group(self, group: ScaleGroup, book: GroupStatistics) -> GroupSolution:
        linears = {name: self.surveyed.linears[name] for name in group.linears}
        if problem := self._unusable(group, book):
            self.warnings.append(f"{', '.join(group.linears)}: {problem}; rounded to nearest instead")
            return self._rounded(linears, book, None, problem)
        second_moment = book.stats.second_moment()
        if self.config.method == "rtn":
            return self._rounded(linears, book, second_moment)
        weights = [linear.weight.detach() for linear in linears.values()]
        choice = search.search_scale(self.kernels, weights, book.x_mean, second_moment, self.config)
        solution = self._scaled(group, linears, choice, book, second_moment)
        if any(layer.report.loss > layer.report.loss_rtn for layer in solution.layers):
            # Ranking saw a sample of the rows, this loss all of them: a group that fails here keeps the identity
            solution = self._scaled(group, linears, ScaleChoice(None), book, second_moment)
        return solution

    def _unusable(self, group: ScaleGroup, book: GroupStatistics) -> str:
        if book.rows == 0 and book.rows_seen > 0:
            raise ValueError(
                f"{', '.join(group.linears)}: all {book.rows_seen} calibration rows are masked out; "
                "check the attention_mask of the calibration batches"
            )
        if book.rows == 0:
            return "no calibration row reached it"
        return "" if book.finite else "its calibration input holds NaN or Inf"

    def _rounded(
        self, linears: Mapping[str, nn.Linear], book: GroupStatistics, second_moment: Tensor | None, note: str = ""
    ) -> GroupSolution:
        layers = []
        for name, linear in linears.items():
            codes = search.quantize(self.kernels, linear.weight.detach(), self.config, None, None)
            loss = None if second_moment is None else self._loss(linear, codes, None, second_moment) / book.rows
            report = LayerReport(
                name, linear.in_features, linear.out_features, self._status, "rtn", "identity",
                loss_rtn=loss, loss=loss, tokens=book.rows, note=note,
            )  # fmt: skip
            layers.append(LayerSolution(name, linear, codes, None, report))
        return GroupSolution(ScaleChoice(None), None, layers)

    def _scaled(
        self,
        group: ScaleGroup,
        linears: Mapping[str, nn.Linear],
        choice: ScaleChoice,
        book: GroupStatistics,
        second_moment: Tensor,
    ) -> GroupSolution:
        fold, scale = self._fold(group, linears, choice)
        solution = GroupSolution(choice, fold)
        applied = "" if choice.scale is None else "norm" if fold else "run time" if self.config.packed else "weights"
        for name, linear in linears.items():
            rtn = search.quantize(self.kernels, linear.weight.detach(), self.config, None, None)
            loss_rtn = self._loss(linear, rtn, None, second_moment)
            codes, loss, clipped = self._clipped(linear, scale, second_moment)
            if loss > loss_rtn and choice.scale is None:
                codes, loss, clipped = rtn, loss_rtn, False
            report = LayerReport(
                name, linear.in_features, linear.out_features, self._status, "awq", choice.kind, choice.alpha, applied,
                clipped, loss_rtn / book.rows, loss / book.rows, book.rows,
            )  # fmt: skip
            solution.layers.append(LayerSolution(name, linear, codes, scale, report))
        return solution

    def _fold(
        self, group: ScaleGroup, linears: Mapping[str, nn.Linear], choice: ScaleChoice
    ) -> tuple[NormFold | None, Tensor | None]:
        norm = self.foldable.get(group.producer or "")
        # fake-quantized weights hold 1/s themselves: nothing to fold
        if choice.scale is None or norm is None or self.config.fold == "never" or not self.config.packed:
            return None, choice.scale
        fold = prove_norm_fold(self.probe, norm, list(linears.values()))
        return fold, choice.scale if fold is None else fold.effective_scale(choice.scale)

    def _clipped(self, linear: nn.Linear, scale: Tensor | None, second_moment: Tensor) -> tuple[Codes, float, bool]:
        """Codes with or without clipped ranges, whichever has less output error over the full second moment."""
        weight = linear.weight.detach()
        full = search.quantize(self.kernels, weight, self.config, scale, None)
        full_loss = self._loss(linear, full, scale, second_moment)
        if self.config.clip is False:
            return full, full_loss, False
        clip = search.search_clip(self.kernels, weight, second_moment, self.config, scale)
        codes = search.quantize(self.kernels, weight, self.config, scale, clip)
        loss = self._loss(linear, codes, scale, second_moment)
        return (codes, loss, True) if loss < full_loss else (full, full_loss, False)

    def _loss(self, linear: nn.Linear, codes: Codes, scale: Tensor | None, second_moment: Tensor) -> float:
        weight = linear.weight.detach()
        return search.output_loss(self.kernels, weight, codes, scale, second_moment, self.config.group_size)

    @property
    def _status(self) -> str:
        return "int4" if self.config.packed else "fake"

    def _quantized(self, groups: Sequence[GroupSolution]) -> dict[tuple[nn.Module, str], Tensor]:
        """Substitutes that make the block compute with the quantized weights (scales undone, so no fold is needed)."""
        return {
            (layer.linear, "weight"): layer.weight(self.config.group_size) for group in groups for layer in group.layers
        }

    def _keep_helpful_clips(self, groups: list[GroupSolution]) -> None:
        pass


def _folded_float(groups: Sequence[GroupSolution]) -> Substitutes:
    """Substitutes for the float block with every fold applied: divided norms, multiplied columns."""
    substitutes: dict[tuple[nn.Module, str], Tensor] = {}
    for group in groups:
        if group.fold is None or group.choice.scale is None:
            continue
        substitutes |= group.fold.divided(group.choice.scale)
        for layer in group.layers:
            weight = layer.linear.weight.detach()
            substitutes[layer.linear, "weight"] = (weight.float() * layer.scale).to(weight.dtype)
    return substitutes


@torch.no_grad()
def build_layer(layer: LayerSolution, fold: NormFold | None, config: AwqConfig) -> nn.Module:
    """The module that takes the Linear's place: a QuantLinear, or for ``packed=False`` a Linear of the same class."""
    from .qlinear import QuantLinear

    if not config.packed:
        linear = nn.Linear(layer.linear.in_features, layer.linear.out_features, device="meta")
        linear.weight = nn.Parameter(layer.weight(config.group_size), requires_grad=layer.linear.weight.requires_grad)
        linear.bias = layer.linear.bias
        return linear.train(layer.linear.training)
    pre_quant_scale = 1 / layer.scale if layer.scale is not None and fold is None else None
    parts = (layer.codes.codes, layer.codes.scales, layer.codes.zeros)
    return QuantLinear.from_codes(layer.linear, *parts, config.group_size, pre_quant_scale)
