"""The steps of one quantize() call, block by block: collect, solve, swap, finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..calibration.importance import weighing_bytes
from ..calibration.padding import warnings_for
from ..calibration.statistics import GroupStatistics, collect
from ..folding.finder import FoldFinder
from ..folding.fold import Change, LinearFold
from ..forwards.calls import Call
from ..forwards.lockstep import Stop
from ..forwards.memory import FreeMemory, release_free_memory
from ..forwards.probe import Probe, combined
from ..forwards.recall import Recall
from ..layers.quant_linear import QuantLinear
from ..modules import foldable_norms
from ..reporting.progress import Progress, say
from ..reporting.report import AwqReport, BlockReport
from ..reporting.tables import format_bytes
from ..solving.bias import own_biases
from ..solving.block_solver import BlockSolver, takes_fold
from ..solving.solution import GroupSolution, build_layer
from ..survey.budget import growth_of
from ..survey.survey import BlockSurvey
from ..workdir.result import BlockResult
from .keeping import Before, Keeping
from .preparation import extra_calls, row_weights
from .quantized_stream import MOST_RETURNED, QuantizedStream
from .rescaled import Rescaling
from .session import Session
from .tuning import ScaleTuning, planned_tuning_bytes


@dataclass(frozen=True, eq=False)
class Block:
    """A block with the batches that wait at its entry. hold: whether they move on only once it is quantized.

    index: its place among all blocks of the survey.
    """

    index: int
    surveyed: BlockSurvey
    stops: list[Stop]
    hold: bool


@dataclass(frozen=True, eq=False)
class Collected:
    """Statistics of a block's inputs, one for each scale group, and the block's output for the first batch.

    recall: what its Linears returned in that run.
    """

    statistics: list[GroupStatistics]
    output: Any
    seconds: float
    recall: Recall | None = None


class Run:
    """The state of one quantize() call, and its steps.

    For each block either :meth:`stored` finds the result of an earlier run, or :meth:`collect` and :meth:`solve` find it, which
    leave the model as it is, and :meth:`keep` keeps it. Then :meth:`swap` changes the model, and :meth:`finished` tells of it.
    """

    _kind_of_finder = FoldFinder

    def __init__(
        self,
        opened: Session,
        surveys: Sequence[BlockSurvey],
        report: AwqReport,
        progress: bool,
        rescaling: Rescaling,
        keeping: Keeping,
    ) -> None:
        self._session, self._surveys, self._report, self._progress = opened, surveys, report, progress
        self._rescaling, self._keeping = rescaling, keeping
        model, config = opened.model, opened.config
        self._calls = opened.calls + extra_calls(opened, report, progress, keeping)
        size = sum(parameter.nbytes for parameter in model.parameters())
        self._tuning = ScaleTuning(model, self._calls, config, report, progress)
        growth = growth_of(self.held_calls())
        report.planned_memory_bytes = keeping.plan(surveys, growth, config, self._before(), size)
        self._weights = row_weights(model, self._calls, surveys, config, report, progress, keeping)
        self._biases = own_biases(model, opened.eligible.linears.values())
        self._finder = self._kind_of_finder(foldable_norms(model))
        self._padded: list[str] = []
        self._stream = QuantizedStream()

    def _before(self) -> Before:
        """Look at the memory before the first block."""
        opened, surveys, calls = self._session, self._surveys, self._calls
        config, forward = opened.config, opened.memory.bytes()
        if config.weighs_rows:
            import torch._dynamo  # noqa: F401  what checkpoints blocks loads it, about 50 MB that stay
        release_free_memory()
        weighing = weighing_bytes(opened.model, calls, surveys, config.weighed_batches) if config.weighs_rows else 0
        kept = planned_tuning_bytes(surveys, calls, 1.0, config) if self._tuning.wanted else 0
        return Before(opened.memory.now(), forward, weighing, kept)

    def held_calls(self) -> list[Call]:
        """Return the batches whose hidden states this process holds."""
        return self._calls

    def all_blocks(self) -> None:
        """Lead the model through all blocks, one after another."""
        with self.blocks() as visited:
            for block in visited:
                result = self.stored(block)
                if result is None:
                    result = self.keep(block, self.solve(block, self.collect(block)))
                self.swap(block, result)
                self.finished(block, result)

    @contextmanager
    def blocks(self) -> Iterator[Iterator[Block]]:
        """Run all batches in lockstep: the body gets block after block. No batch runs where all blocks are finished."""
        done = self._keeping.has_all(self._surveys)
        visits = self._session.visits(self._surveys, self._calls, self._keeping.waits)
        none_waits = nullcontext((one, []) for one in self._surveys)
        with none_waits if done else visits as visited, self._bar() as bar:
            yield self._each(visited, bar)
        self._report.warnings += warnings_for(self._padded)

    def _each(self, visits: Iterator[tuple[BlockSurvey, list[Stop]]], bar: Progress) -> Iterator[Block]:
        for index, (surveyed, stops) in enumerate(visits):
            peak = format_bytes(self._session.memory.bytes())
            bar.note(f"{surveyed.block.name or 'whole model'}, peak {peak}")
            release_free_memory()
            if surveyed.groups:
                last = surveyed is self._surveys[-1]
                yield Block(index, surveyed, stops, last or self._session.config.propagate == "quantized")
            bar.update()

    def stored(self, block: Block) -> BlockResult | None:
        """Read what an earlier run found for the block; None if none finished it."""
        result = self._keeping.load(block.index, block.surveyed)
        if result is not None:
            self._finder.remember(*self._folds_of(block), result.pattern)
        return result

    def collect(self, block: Block) -> Collected:
        """Collect statistics while the batches stream through the float block."""
        start = time.perf_counter()
        given = (block.surveyed, block.stops, self._session.device, block.hold, self._weights)
        recall = Recall(block.surveyed.linears.values())
        found, output = collect(*given, advance=self._way_on(block, target=True), run=recall.keep(Stop.run_on_copies))
        return Collected(found, output, time.perf_counter() - start, recall)

    def solve(self, block: Block, collected: Collected) -> BlockResult:
        """Find the scales, folds and codes of the block; the model stays as it is."""
        start = time.perf_counter()
        first = block.stops[0]
        recall = collected.recall or Recall(block.surveyed.linears.values())
        probe = Probe(first.run_on_copies, collected.output, first.call.row_mask, recall)
        config = self._session.config
        probes = partial(self._stream.probes, block.stops) if self._learns(block, probe) else None
        given = (block.surveyed, collected.statistics, probe, config, self._finder, self._biases, probes)
        result = self._result(*BlockSolver(*given).solve())
        result.padded = [name for group in collected.statistics for name in group.including_padding]
        result.pattern = self._finder.remembered(*self._folds_of(block))
        result.calibration_seconds = collected.seconds
        result.search_seconds = time.perf_counter() - start
        return result

    def _way_on(self, block: Block, target: bool) -> Callable[[Stop], None]:
        """Return what lets a batch go on; where codes are learned, what arrives behind quantized blocks is kept with it."""
        follows = self._session.config.learn_rounding > 0 and not block.hold
        return partial(self._stream.advance, target=target) if follows else Stop.advance

    def _learns(self, block: Block, probe: Probe) -> bool:
        """Whether codes are learned: not where all outputs would take much more memory than all inputs, as logits do."""
        returned = sum(one.nbytes for one in probe.reference)
        return self._session.config.learn_rounding > 0 and returned <= MOST_RETURNED * block.surveyed.input_bytes

    def _folds_of(self, block: Block) -> tuple[Any, ...]:
        """Return what the finder of folds asks of a block."""
        groups = block.surveyed.groups
        return groups, block.surveyed.linears, [takes_fold(group, self._session.config) for group in groups]

    def _result(self, groups: Sequence[GroupSolution], told: BlockReport) -> BlockResult:
        """Build the layers and new parameters that the solutions stand for."""
        result = BlockResult(told)
        if told.note:
            result.warnings.append(f"block {told.name or '(whole model)'}: {told.note}")
        result.warnings += _problems(groups, self._session.limited)
        names = {id(module): name for name, module in self._session.model.named_modules()}
        changes = combined(_changes(groups))
        result.writes = {f"{names[id(module)]}.{leaf}".lstrip("."): v for (module, leaf), v in changes.items()}
        for group in groups:
            result.layers.extend(group.reports())
            for layer in group.layers:
                built = self._tuning.layer(layer, build_layer(layer, group.fold))
                factor = self._rescaling.factor(layer.task.name, layer.task.linear.weight)
                if isinstance(built, QuantLinear) and factor != 1:
                    built.rescaled = factor
                result.modules[layer.task.name] = built
        return result

    def keep(self, block: Block, result: BlockResult) -> BlockResult:
        """Keep what was found where the next run finds it."""
        self._keeping.store(block.index, result, self._session.memory.bytes())
        return result

    def swap(self, block: Block, result: BlockResult) -> None:
        """Put int4 layers in place of the block's Linears, and apply the folds."""
        if not block.hold:
            free = FreeMemory()
            advance = self._way_on(block, target=False)
            # through the float block; most of them went that way when statistics were collected
            for stop in block.stops:
                if stop.waiting:
                    advance(stop)
                    free.release_if_grown()
        journal, model = self._session.journal, self._session.model
        for name, values in result.writes.items():
            owner, _, leaf = name.rpartition(".")
            parameter = model.get_submodule(owner)._parameters[leaf]
            journal.write_tensor(parameter, values.to(parameter.device))
        for name, module in result.modules.items():
            journal.set_module(model, name, module)
        self._tuning.take(result.modules)
        self._stream.follow()

    def finished(self, block: Block, result: BlockResult) -> None:
        """Give back what the block took, and report what was found."""
        self._keeping.release(block.surveyed, result)
        report = self._report
        report.blocks.append(result.block)
        report.layers += result.layers
        report.warnings += result.warnings
        report.quantized_parameters += result.weights
        report.calibration_seconds += result.calibration_seconds
        report.search_seconds += result.search_seconds
        self._padded += result.padded

    def tune(self) -> None:
        """Tune the scales of all layers end to end, if that is wanted."""
        self._tuning.finish(self._surveys, self._session.journal)

    def _bar(self) -> Progress:
        if self._progress:
            places = [place for place, one in enumerate(self._surveys) if one.groups]
            if finished := sum(map(self._keeping.holds, places)):
                say(f"going on after {finished} of {len(places)} blocks, which an earlier run finished")
            planned = format_bytes(self._report.planned_memory_bytes)
            say(f"{len(self._surveys)} blocks, planned peak memory {planned}, model included")
        return Progress(len(self._surveys), "quantizing", "block", self._progress)


def _changes(groups: Sequence[GroupSolution]) -> list[Change]:
    """List the changes to biases and norms. Corrections of biases come first, because a fold divides the corrected bias."""
    changes = [change for group in groups for layer in group.layers for change in layer.changes()]
    for group in groups:
        if group.fold is not None:
            # not the rows of a Linear: its codes were made of the divided rows
            rows = (group.fold.module, "weight") if isinstance(group.fold, LinearFold) else None
            changes += [one for one in group.fold.changes(group.choice.scale) if one[:2] != rows]
    return changes


def _problems(groups: Sequence[GroupSolution], limited: bool) -> list[str]:
    """Write one warning for each group and problem, but a single one for all experts that saw too few rows.

    limited: whether ``max_calib_tokens`` left text out, which may be why they did.
    """
    named: dict[Any, list[str]] = {}
    for group in groups:
        for layer in group.layers:
            few = layer.seldom_called and layer.task.name in group.task.group.experts
            key = "" if few else (group.task.group.linears, layer.task.problem)
            if layer.task.problem:
                named.setdefault(key, []).append(
                    f"{layer.task.name} ({layer.task.input.rows})" if few else layer.task.name
                )
    rare = "experts that fewer than min_tokens calibration rows reached"
    rare += " (max_calib_tokens left text out, 0 takes all of it)" * limited
    texts = {key: key[1] if key else rare for key in named}
    return [f"{', '.join(names)}: {texts[key]}; rounded to nearest instead" for key, names in named.items()]
