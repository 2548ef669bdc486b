"""The solver of one block: from statistics to scales, folds, clips and codes. It reads the model and never writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..calibration.gradients import without_gradients
from ..calibration.statistics import GroupStatistics
from ..config import AwqConfig
from ..folding.finder import FoldFinder
from ..folding.fold import Change, Fold, LinearFold
from ..forwards.memory import FreeMemory
from ..forwards.probe import Probe, Substitutes, combined, output_dtypes
from ..reporting.report import BlockReport
from ..survey.groups import ScaleGroup
from ..survey.survey import BlockSurvey
from .clips import keep_clips_that_serve
from .codes import spread_rows
from .gptq import Quantizer
from .learned import learn_rounding
from .rounding import loss_after_gptq, rounded, searched
from .scales import STRENGTHS, ScaleChoice, rows_to_judge_by, search_scale
from .solution import GroupSolution, substitutes_of
from .tasks import GroupTask, LayerTask, problem_of

# For each Linear with a later group's scale folded into its rows, what these are divided by: fp32 [N].
Divisors = dict[nn.Linear, Tensor]


class BlockSolver:
    """Solver of the scale groups of one block.

    probe: gives the block's output under substituted parameters. biases: the Linears whose bias may take over the mean of their
    error (``bias.own_biases``). probes: makes those of all batches, with gradients, on which codes are learned; None: they are not.
    """

    def __init__(
        self,
        surveyed: BlockSurvey,
        statistics: Sequence[GroupStatistics],
        probe: Probe,
        config: AwqConfig,
        finder: FoldFinder,
        biases: Set[nn.Linear] = frozenset(),
        probes: Callable[[], Sequence[Probe]] | None = None,
    ) -> None:
        self._surveyed = surveyed
        self._statistics = statistics
        self._probe = probe
        self._config = config
        self._finder = finder
        self._biases = biases
        self._probes = probes
        self._free = FreeMemory()

    def solve(self) -> tuple[list[GroupSolution], BlockReport]:
        """Solve all groups, and measure how far the block's output moves."""
        report = BlockReport(self._surveyed.block.name)
        wanted = [takes_fold(group, self._config) for group in self._surveyed.groups]
        folds = self._finder.find(self._probe, self._surveyed.groups, self._surveyed.linears, wanted)
        self._free.release_if_grown()
        groups, coarse = self._solve_without_worse(folds)
        report.fold_error, allowed = self._fold_error(groups)
        if report.fold_error > allowed:
            report.note = (
                f"no folds: they would move its float output by {report.fold_error:.2g} (allowed {allowed:.2g})"
            )
            groups, _ = self._solve_without_worse([None] * len(folds), coarse)
            report.fold_error = 0.0
        self._free.release_if_grown()
        groups, distance = keep_clips_that_serve(self._probe, groups)
        if self._probes is not None:
            groups, distance = self._learned(groups, distance, report)
        report.output_error = distance / (self._probe.norm or 1.0)
        final = [replace(group, layers=tuple(layer.with_bias_shift() for layer in group.layers)) for group in groups]
        return final, report

    def _learned(
        self, groups: Sequence[GroupSolution], distance: float, report: BlockReport
    ) -> tuple[list[GroupSolution], float]:
        """Learn codes and scales from those found; return the groups as they are where the block has no gradients."""
        try:
            with without_gradients(self._surveyed.block.module):
                found, learned = learn_rounding(self._probes(), groups, self._config.learn_rounding)
        except RuntimeError as error:  # a model need not have gradients to be quantized
            report.note = "; ".join(filter(None, [report.note, f"rounding not learned: {error}"]))
            return list(groups), distance
        self._free.release_if_grown()
        if learned is None or not learned.kept:
            return list(groups), distance
        return found, self._probe.distance(substitutes_of(layer for group in found for layer in group.layers))

    def _solve_without_worse(
        self, folds: Sequence[Fold | None], coarse: Set[nn.Linear] = frozenset()
    ) -> tuple[list[GroupSolution], Set[nn.Linear]]:
        """Solve all groups, giving up folds that leave a Linear with more error than RTN.

        coarse: Linears that are searched by the plain second moment, because their bias is too coarse to hold the mean error that
        a search around the mean leaves to it. They are returned together with those found here.
        """
        while True:
            groups = self._solve_groups(folds, coarse)
            layers = [layer for group in groups for layer in group.layers]
            if more := {layer.task.linear for layer in layers if layer.bias_too_coarse}:
                coarse = coarse | more
                continue
            worse = {layer.task.linear for layer in layers if layer.worse_than_rtn}
            if not worse:
                return groups, coarse
            # The only cause left is a fold into the Linear's rows: dividing a row changes how its group scales are rounded.
            # Without the fold the Linear falls back to RTN's codes.
            kept = [None if isinstance(fold, LinearFold) and fold.module in worse else fold for fold in folds]
            assert kept != folds, "only a fold into its rows can leave a Linear worse than RTN"
            folds = kept

    def _fold_error(self, groups: Sequence[GroupSolution]) -> tuple[float, float]:
        """Measure the relative change of the block's float output once all folds are applied; also return the bound on it.

        Each folded parameter is rounded once more, by at most eps / 2, and so are the columns that make up for it. A path through
        a block meets four folds (norm, values, norm, up), which gives 4 eps; the bound is twice that, because terms of a sum may
        cancel. The folds were proven exact already; this catches chosen scales that leave the range of the dtype.
        """
        folded = _folded_float(groups)
        if not folded:
            return 0.0, 0.0
        linears = list(self._surveyed.linears.values())
        # autocast computes in a lower precision than that of the weights
        with output_dtypes(linears) as dtypes:
            error = self._probe.distance(folded) / (self._probe.norm or 1.0)
        return error, 8 * max(torch.finfo(dtype).eps for dtype in {linear.weight.dtype for linear in linears} | dtypes)

    def _solve_groups(self, folds: Sequence[Fold | None], coarse: Set[nn.Linear]) -> list[GroupSolution]:
        tasks = [self._task(*one, coarse) for one in zip(self._surveyed.groups, self._statistics, strict=True)]
        choices = [self._choose(task, fold) for task, fold in zip(tasks, folds, strict=True)]
        divisors: Divisors = {}
        solved = []
        # from the last group to the first: a Linear is rounded once it is known what is folded into its rows
        for task, fold, choice in reversed(list(zip(tasks, folds, choices, strict=True))):
            group = self._solve_group(task, fold, choice, divisors)
            self._free.release_if_grown()
            if isinstance(group.fold, LinearFold):
                divisors[group.fold.module] = group.fold.divisor(group.choice.scale)
            solved.append(group)
        return solved[::-1]

    def _task(self, group: ScaleGroup, statistics: GroupStatistics, coarse: Set[nn.Linear]) -> GroupTask:
        layers = []
        for name in group.linears:
            linear, settings, given = (
                self._surveyed.linears[name],
                self._config.for_layer(name),
                statistics.inputs[name],
            )
            expert = name in self._experts and settings.method != "rtn"
            problem = problem_of(given, self._config.min_tokens if expert else 0)
            corrects = linear in self._biases and settings.corrects_bias
            centred = corrects and linear not in coarse
            layers.append(LayerTask(name, linear, settings, given, problem, corrects, centred))
        return GroupTask(group, statistics, tuple(layers))

    @property
    def _experts(self) -> set[str]:
        return {name for group in self._surveyed.groups for name in group.experts}

    def _choose(self, task: GroupTask, fold: Fold | None) -> ScaleChoice:
        """Search for the group's scale; return the identity where none is wanted, or where nothing may take over 1/s."""
        usable = task.usable
        if not usable or not usable[0].settings.searches_scale:
            return ScaleChoice(None)
        if fold is None and usable[0].settings.packed and self._config.fold == "always":
            return ScaleChoice(None)
        choice = search_scale(
            [one.weight for one in usable],
            task.statistics.x_mean([one.name for one in usable]),
            [one.second_moment for one in usable],
            [one.settings for one in usable],
            None if fold is None else fold.tie,
            alone=_each_alone(task, fold),
        )
        return _weakened(choice, usable) if usable[0].settings.uses_gptq and choice.scale is not None else choice

    def _solve_group(
        self, task: GroupTask, fold: Fold | None, choice: ScaleChoice, divisors: Divisors
    ) -> GroupSolution:
        _refuse_masked(task)
        if not task.usable or task.settings.method == "rtn":
            return GroupSolution(
                task, layers=tuple(rounded(one, None, divisors.get(one.linear)) for one in task.layers)
            )
        if choice.scale is None and self._could_divide(task, fold):
            fold, choice = None, self._choose(task, None)
        solution = _scaled(task, choice, fold, divisors)
        # Ranking saw a sample of the rows, this loss sees all of them: a group that fails here keeps the identity
        if not any(layer.worse_than_rtn for layer in solution.layers):
            return solution
        if _each_alone(task, solution.fold):
            return _without_scale_where_worse(solution, divisors)
        if self._could_divide(task, fold):
            return self._solve_group(task, None, self._choose(task, None), divisors)
        return _scaled(task, ScaleChoice(None), None, divisors)

    def _could_divide(self, task: GroupTask, fold: Fold | None) -> bool:
        """Tell whether a fold for all experts may be replaced by divisions at run time, which each expert uses or not."""
        return fold is not None and len(task.group.inputs) > 1 and self._config.fold == "auto"


def takes_fold(group: ScaleGroup, config: AwqConfig) -> bool:
    """Tell whether the group will have a scale that may be folded; fake-quantized weights hold 1/s themselves."""
    settings = config.for_layer(group.linears[0])
    return settings.searches_scale and settings.packed and config.fold != "never"


def _refuse_masked(task: GroupTask) -> None:
    if task.statistics.rows == 0 and task.statistics.rows_seen > 0:
        raise ValueError(
            f"{', '.join(task.group.linears)}: all {task.statistics.rows_seen} calibration rows are masked out; "
            "check the attention_mask of the calibration batches"
        )


def _scaled(task: GroupTask, choice: ScaleChoice, fold: Fold | None, divisors: Divisors) -> GroupSolution:
    """Quantize the group's Linears under the chosen scale, or the nearest one that ``fold`` takes over exactly."""
    scale = choice.scale if fold is None or choice.scale is None else fold.effective_scale(choice.scale)
    fold = None if scale is None else fold
    layers = []
    for one, quantizer in zip(task.layers, _quantizers(task.layers, scale), strict=True):
        divisor = divisors.get(one.linear)
        if one.problem:
            # a norm that holds 1/s divides the input of all Linears that read it, this one too
            layers.append(rounded(one, None if fold is None else scale, divisor))
        else:
            layers.append(searched(one, quantizer, divisor))
    return GroupSolution(task, replace(choice, scale=scale), fold, tuple(layers))


def _without_scale_where_worse(group: GroupSolution, divisors: Divisors) -> GroupSolution:
    layers = [
        searched(one.task, Quantizer(one.task.second_moment), divisors.get(one.task.linear))
        if one.worse_than_rtn
        else one
        for one in group.layers
    ]
    return replace(group, layers=tuple(layers))


def _weakened(choice: ScaleChoice, tasks: Sequence[LayerTask]) -> ScaleChoice:
    """Raise the scale to the power (of ``STRENGTHS``) under which the Linears lose least with error feedback."""
    counts = rows_to_judge_by([task.weight for task in tasks], tasks[0].settings.search_rows)
    trials = [choice.weakened(power) for power in STRENGTHS]
    losses = [0.0] * len(trials)
    for task, count, quantizer in zip(tasks, counts, _quantizers(tasks), strict=True):
        rows = spread_rows(len(task.weight), count, task.weight.device)
        for i, trial in enumerate(trials):
            losses[i] += loss_after_gptq(task, rows, quantizer.under(trial.scale))
    return trials[losses.index(min(losses))]


def _quantizers(tasks: Sequence[LayerTask], scale: Tensor | None = None) -> Iterator[Quantizer]:
    """Yield a quantizer for each Linear. Linears that read one input and use the same moment of it share one, factored once."""
    last, made = None, {}
    for task in tasks:
        if task.input is not last:
            last, made = task.input, {}
        if task.centred not in made:
            made[task.centred] = Quantizer(task.second_moment, scale)
        yield made[task.centred]


def _each_alone(task: GroupTask, fold: Fold | None) -> bool:
    """Tell whether each Linear can do without the group's scale: experts that divide their own rows at run time can."""
    return fold is None and len(task.group.inputs) > 1


def _folded_float(groups: Sequence[GroupSolution]) -> Substitutes:
    """Build the parameters of the float block with every fold applied: divided producers, multiplied columns."""
    changes: list[Change] = []
    for group in groups:
        if group.fold is None:
            continue
        scale = group.choice.scale
        changes += group.fold.changes(scale)
        changes += [(layer.task.linear, "weight", lambda w, scale=scale: w * scale) for layer in group.layers]
    return combined(changes)
