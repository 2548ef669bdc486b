"""One block, from statistics to quantized layers: scales, folds, clips, codes. Reads the model, never writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor, nn

from ..calibration.statistics import GroupStatistics, InputStatistics
from ..config import AwqConfig
from ..folding.finder import FoldFinder
from ..folding.fold import Change, Fold, LinearFold
from ..forwards.probe import Probe, Substitutes, combined, output_dtypes
from ..reporting.report import BlockReport
from ..survey.groups import ScaleGroup
from ..survey.survey import BlockSurvey
from .bias import CentredStats
from .clips import settle_clips
from .codes import spread_rows
from .gptq import Feedback
from .rounding import Rounding
from .scales import STRENGTHS, ScaleChoice, rows_to_judge_by, search_scale
from .solution import NO_ROWS, GroupSolution, LayerSolution


class BlockSolver:
    """Solves the groups of one block. ``probe`` gives the block's output under substituted parameters.

    biases: the Linears whose bias may take over the mean of their error (``bias.own_biases``).
    """

    def __init__(
        self,
        surveyed: BlockSurvey,
        books: Sequence[GroupStatistics],
        probe: Probe,
        kernels: ModuleType,
        config: AwqConfig,
        finder: FoldFinder,
        biases: Set[nn.Linear] = frozenset(),
    ) -> None:
        self.surveyed = surveyed
        self.books = books
        self.probe = probe
        self.kernels = kernels
        self.rounding = Rounding(kernels)
        self.config = config
        self.finder = finder
        self.biases = biases
        self.coarse: set[nn.Linear] = set()  # those whose bias could not hold what a search around the mean left to it
        self.centred: dict[int, InputStatistics] = {}  # by id of the input's own statistics
        self.divisors: dict[nn.Linear, Tensor] = {}
        self.problems: dict[str, str] = {}
        self.experts = {name for group in surveyed.groups for name in group.experts}

    def solve(self) -> tuple[list[GroupSolution], BlockReport]:
        """All groups of the block, and how far its output moved."""
        report = BlockReport(self.surveyed.block.name)
        folds = self._find_folds()
        groups = self._solve_without_worse(folds)
        report.fold_error, allowed = self._fold_error(groups)
        if report.fold_error > allowed:
            report.note = (
                f"no folds: they would move its float output by {report.fold_error:.2g} (allowed {allowed:.2g})"
            )
            groups = self._solve_without_worse([None] * len(folds))
            report.fold_error = 0.0
        report.output_error = settle_clips(self.probe, groups) / (self.probe.norm or 1.0)
        for group in groups:
            for layer in group.layers:
                layer.settle()
        return groups, report

    def _solve_without_worse(self, folds: Sequence[Fold | None]) -> list[GroupSolution]:
        """All groups; folds that leave a Linear with more error than RTN are given up."""
        while True:
            groups = self._solve_groups(folds)
            if coarse := {x.linear for group in groups for x in group.layers if x.too_coarse}:
                self.coarse |= coarse
                continue
            worse = {x.linear for group in groups for x in group.layers if x.loss is not None and x.loss > x.limit}
            if not worse:
                return groups
            # Dividing a row changes how its group scales are rounded: nothing but that can be left. Without the fold the
            # Linear falls back to RTN's codes.
            kept = [None if isinstance(fold, LinearFold) and fold.module in worse else fold for fold in folds]
            assert kept != folds, "only a fold into its rows can leave a Linear worse than RTN"
            folds = kept

    def _fold_error(self, groups: Sequence[GroupSolution]) -> tuple[float, float]:
        """Relative change of the block's float output once the folds are applied, with the scales chosen; and what may be.

        Each folded parameter is rounded once more, at most eps / 2 of it, and so are the columns that make up for it.
        A path through a block meets four folds (norm, values, norm, up), so 4 eps, and as much again for what sums cancel. The
        folds themselves were proven exactly; this catches scales that leave the range of the dtype.
        """
        folded = _folded_float(groups)
        if not folded:
            return 0.0, 0.0
        linears = list(self.surveyed.linears.values())
        # autocast computes in less than the weights' precision
        with output_dtypes(linears) as dtypes:
            error = self.probe.distance(folded) / (self.probe.norm or 1.0)
        return error, 8 * max(torch.finfo(dtype).eps for dtype in {linear.weight.dtype for linear in linears} | dtypes)

    def _solve_groups(self, folds: Sequence[Fold | None]) -> list[GroupSolution]:
        self.divisors = {}
        inputs = list(zip(self.surveyed.groups, self.books, folds, strict=True))
        choices = [self._choose(*one) for one in inputs]
        # from the last group to the first: a Linear is rounded once it is known what is folded into its rows
        pairs = reversed(list(zip(inputs, choices, strict=True)))
        return [self._solve_group(*one, choice) for one, choice in pairs][::-1]

    def _choose(self, group: ScaleGroup, book: GroupStatistics, fold: Fold | None) -> ScaleChoice:
        usable = [name for name in group.linears if not self._problem(name, book)]
        settings = [self.config.for_layer(name) for name in usable]
        if not usable or not settings[0].searches_scale:
            return ScaleChoice(None)
        if fold is None and settings[0].packed and self.config.fold == "always":
            return ScaleChoice(None)
        weights = [self.surveyed.linears[name].weight.detach() for name in usable]
        moments = (self._input(name, book).stats.second_moment() for name in usable)
        tie = None if fold is None else fold.tie
        choice = search_scale(
            self.kernels, weights, book.x_mean(usable), moments, settings, tie, alone=_each_alone(group, fold)
        )
        return self._weakened(choice, usable, book) if settings[0].feeds_back and choice.scale is not None else choice

    def _weakened(self, choice: ScaleChoice, names: Sequence[str], book: GroupStatistics) -> ScaleChoice:
        """The power of the scale by which the Linears called ``names`` lose least once errors are fed back."""
        linears = [self.surveyed.linears[name] for name in names]
        settings = [self.config.for_layer(name) for name in names]
        counts = rows_to_judge_by([linear.weight for linear in linears], settings[0].search_rows)
        rows = [
            spread_rows(len(linear.weight), count, linear.weight.device)
            for linear, count in zip(linears, counts, strict=True)
        ]
        trials = [choice.weakened(power) for power in STRENGTHS]
        losses = [0.0] * len(trials)
        for *one, feedback in zip(linears, settings, rows, self._feedbacks(names, book, None), strict=True):
            for i, trial in enumerate(trials):
                losses[i] += self.rounding.loss_after_feedback(*one, feedback.under(trial.scale))
        return trials[losses.index(min(losses))]

    def _feedbacks(self, names: Sequence[str], book: GroupStatistics, scale: Tensor | None) -> Iterator[Feedback]:
        """One for each Linear; those of one input share one, or two: around its mean or not, each factorized once."""
        last, made = None, {}
        for name in names:
            if book.inputs[name] is not last:
                last, made = book.inputs[name], {}
            one = self._input(name, book)
            if one.centred not in made:
                made[one.centred] = Feedback(self.kernels, one.stats.second_moment(), scale)
            yield made[one.centred]

    def _problem(self, name: str, book: GroupStatistics) -> str:
        """Why the statistics of a Linear's input cannot guide a search, or ""."""
        if name not in self.problems:
            searched = name in self.experts and self.config.for_layer(name).method != "rtn"
            few = self.config.min_tokens if searched else 0
            self.problems[name] = _unusable(book.inputs[name], few)
        return self.problems[name]

    def _solve_group(
        self, group: ScaleGroup, book: GroupStatistics, fold: Fold | None, choice: ScaleChoice
    ) -> GroupSolution:
        if book.rows == 0 and book.rows_seen > 0:
            raise ValueError(
                f"{', '.join(group.linears)}: all {book.rows_seen} calibration rows are masked out; "
                "check the attention_mask of the calibration batches"
            )
        if all(self._problem(name, book) for name in group.linears) or self._settings(group).method == "rtn":
            return GroupSolution(group, book, layers=[self._rounded(name, book) for name in group.linears])
        if choice.scale is None and self._could_divide(group, fold):
            fold, choice = None, self._choose(group, book, None)
        solution = self._scaled(group, choice, fold, book)
        worse = [layer for layer in solution.layers if layer.loss is not None and layer.loss > layer.limit]
        # Ranking saw a sample of the rows, this loss all of them: what fails here keeps the identity
        if worse and _each_alone(group, solution.fold):
            for layer in worse:
                feedback = Feedback(self.kernels, layer.book.stats.second_moment(), None)
                apart = self._searched(layer.name, layer.book, feedback)
                solution.layers[solution.layers.index(layer)] = apart
        elif worse and self._could_divide(group, fold):
            return self._solve_group(group, book, None, self._choose(group, book, None))
        elif worse:
            solution = self._scaled(group, ScaleChoice(None), None, book)
        if isinstance(solution.fold, LinearFold):
            self.divisors[solution.fold.module] = solution.fold.divisor(solution.choice.scale)
        return solution

    def _could_divide(self, group: ScaleGroup, fold: Fold | None) -> bool:
        """Whether experts of which some gain nothing from a scale in the norm may divide their rows at run time, each or not."""
        return fold is not None and len(group.inputs) > 1 and self.config.fold == "auto"

    def _settings(self, group: ScaleGroup) -> AwqConfig:
        return self.config.for_layer(group.linears[0])

    def _scaled(
        self, group: ScaleGroup, choice: ScaleChoice, fold: Fold | None, book: GroupStatistics
    ) -> GroupSolution:
        scale = choice.scale if fold is None or choice.scale is None else fold.effective_scale(choice.scale)
        fold = None if scale is None else fold
        solution = GroupSolution(group, book, replace(choice, scale=scale), fold)
        for name, feedback in zip(group.linears, self._feedbacks(group.linears, book, scale), strict=True):
            if self._problem(name, book):
                # a norm that holds 1/s holds it for all that read it
                solution.layers.append(self._rounded(name, book, None if fold is None else scale))
            else:
                solution.layers.append(self._searched(name, self._input(name, book), feedback))
        return solution

    def _corrects(self, name: str) -> bool:
        return self.surveyed.linears[name] in self.biases and self.config.for_layer(name).corrects_bias

    def _input(self, name: str, book: GroupStatistics) -> InputStatistics:
        """The statistics that guide a Linear: around the mean of its input where its bias takes over that mean's error."""
        one = book.inputs[name]
        if self.surveyed.linears[name] in self.coarse or not self._corrects(name):
            return one
        if id(one) not in self.centred:
            self.centred[id(one)] = InputStatistics(CentredStats(one.stats), one.rows_seen, centred=True)
        return self.centred[id(one)]

    def _rounded(self, name: str, book: GroupStatistics, scale: Tensor | None = None) -> LayerSolution:
        linear, settings = self.surveyed.linears[name], self.config.for_layer(name)
        divisor, problem = self.divisors.get(linear), self._problem(name, book)
        return self.rounding.nearest(name, linear, settings, book.inputs[name], scale, divisor, problem)

    def _searched(self, name: str, book: InputStatistics, feedback: Feedback) -> LayerSolution:
        linear, settings = self.surveyed.linears[name], self.config.for_layer(name)
        layer = self.rounding.searched(name, linear, settings, book, feedback, self.divisors.get(linear))
        layer.corrected = self._corrects(name)
        return layer

    def _find_folds(self) -> list[Fold | None]:
        """For each group, what takes its 1/s, proven."""
        groups = self.surveyed.groups
        wanted = [takes_fold(group, self.config) for group in groups]
        return self.finder.find(self.probe, groups, self.surveyed.linears, wanted)


def takes_fold(group: ScaleGroup, config: AwqConfig) -> bool:
    """Whether the group will have a scale that something can take over; fake-quantized weights hold 1/s themselves."""
    settings = config.for_layer(group.linears[0])
    return settings.searches_scale and settings.packed and config.fold != "never"


def _unusable(book: InputStatistics, few: int) -> str:
    if book.rows == 0:
        return NO_ROWS
    if not book.finite:
        return "its calibration input holds NaN or Inf"
    return f"{book.rows} calibration rows, fewer than min_tokens={few}" if book.rows < few else ""


def _each_alone(group: ScaleGroup, fold: Fold | None) -> bool:
    """Whether a Linear can do without the group's scale: experts that divide their own rows at run time."""
    return fold is None and len(group.inputs) > 1


def _folded_float(groups: Sequence[GroupSolution]) -> Substitutes:
    """Substitutes for the float block with every fold applied: divided producers, multiplied columns."""
    changes: list[Change] = []
    for group in groups:
        if group.fold is None:
            continue
        changes += group.fold.changes(group.choice.scale)
        changes += [(layer.linear, "weight", lambda w, scale=group.choice.scale: w * scale) for layer in group.layers]
    return combined(changes)
