"""quantize(): from a float model and calibration samples to int4 layers, in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..calibration.builtin import builtin_calibration, is_builtin
from ..calibration.extra_batches import generated_calls, random_calls
from ..calibration.importance import find_weights
from ..calibration.padding import warnings_for
from ..calibration.row_weights import Weights
from ..calibration.statistics import GroupStatistics, collect
from ..config import AwqConfig, configured
from ..folding.finder import FoldFinder
from ..folding.fold import Change, LinearFold
from ..forwards.calls import Call
from ..forwards.lockstep import Stop
from ..forwards.memory import release_free_memory
from ..forwards.probe import Probe, combined
from ..forwards.rescaled import Rescaling
from ..layers.announcement import announce
from ..layers.quant_linear import QuantLinear
from ..modules import foldable_norms, heads_among, input_embeddings, unwrapped
from ..reporting.progress import Progress, draws_bars, say
from ..reporting.report import AwqReport, LayerReport
from ..reporting.tables import format_bytes
from ..reporting.warn import warn
from ..solving.bias import own_biases
from ..solving.block_solver import BlockSolver
from ..solving.solution import GroupSolution, build_layer
from ..survey.budget import growth_of, planned_bytes
from ..survey.survey import BlockSurvey, reasons_to_stay
from ..undo import interrupt
from ..undo.thread_state import restoring
from .session import Session, session
from .tuning import ScaleTuning, planned_tuning_bytes

_FEW_TOKENS = 4000


@restoring
def quantize(
    model: nn.Module,
    calib_loader: Iterable[Any],
    config: AwqConfig | Mapping[str, Any] | None = None,
    *,
    tokenizer: Callable[..., Any] | None = None,
    inputs: str | Callable[[Any], Any] = "all",
    blocks: Sequence[str] | None = None,
    progress: bool = True,
    **overrides: Any,
) -> nn.Module:
    """Quantize the Linears of ``model`` to int4, in place, by activation-aware weight quantization (arXiv 2306.00978).

    model: any nn.Module with nn.Linear inside, float32, bfloat16 or float16. Compiled kernels run on the CPU, plain torch on any
        other device.
    calib_loader: iterable of samples, each a Tensor, a tuple or list (positional arguments), a mapping (keywords; rows that
        ``attention_mask`` marks 0 do not count), a list of token ids or, with ``tokenizer``, a str, a list of messages, or a row of
        a data set with "text", "messages", "conversations" or "prompt" and "completion". Tensors are moved to the model's device.
        "builtin" (with ``tokenizer``): a small mix of languages and code that ships with the package, and as much text that the
        model writes itself (``generated_tokens``). Text of your own traffic is better.
    inputs: what of a sample the model is called with: "all"; "first" for loaders of (input, label) pairs; or a function of it.
    blocks: names of the modules to calibrate one after another; None finds them, [] takes the model as a whole.
    config, overrides: an :class:`AwqConfig` or a dict of its fields (or AutoAWQ's), and fields by name, such as ``group_size=64``.

    Returns ``model``, with QuantLinear in place of nn.Linear and ``model.awq_report`` telling what was done; one of Transformers
    also writes whole quantized checkpoints with its own ``save_pretrained``. Raises ValueError
    or TypeError for unusable arguments, CalibrationError when the model rejects a batch, and whatever the loader raises. After
    any exception, KeyboardInterrupt included, the model is bit for bit what it was. A Ctrl-C takes effect after the current forward
    of a block or search of a layer; a second one takes effect at once. One that comes when all is done leaves the quantized model.
    """
    given, model = model, unwrapped(model)
    config = configured(config, overrides)
    if is_builtin(calib_loader):
        calib_loader, config = builtin_calibration(tokenizer, config)
    started = time.perf_counter()
    report = AwqReport(config=config.to_dict(), parameters=sum(p.numel() for p in model.parameters()))
    rescaling = Rescaling(model)
    with session(model, calib_loader, config, tokenizer, inputs, undo=False) as opened:
        _warn_of_few_tokens(opened)
        with opened.surveyed(blocks) as surveys:
            run = _Run(opened, surveys, report, progress, rescaling)
            with run.blocks() as visited:
                for block in visited:
                    collected = run.collect(block)
                    groups = run.solve(block, collected)
                    run.swap(block, groups)
            run.tune()
        _finish(opened, surveys, report)
        report.seconds = time.perf_counter() - started
        for text in report.warnings:
            warn(text)
        interrupt.check()
        # last, so that an exception until here (a warning may be one) leaves nothing behind
        announce(model)
        model.awq_report = report
    return given


@dataclass(frozen=True, eq=False)
class _Block:
    """A block with the batches that wait at its entry. hold: whether they move on only once it is quantized."""

    surveyed: BlockSurvey
    stops: list[Stop]
    hold: bool


@dataclass(frozen=True, eq=False)
class _Collected:
    """Statistics of a block's inputs, one for each scale group, and the block's output for the first batch."""

    statistics: list[GroupStatistics]
    output: Any


class _Run:
    """The state of one quantize() call, and its steps: three for each block, and one for all."""

    def __init__(
        self,
        opened: Session,
        surveys: Sequence[BlockSurvey],
        report: AwqReport,
        progress: bool,
        rescaling: Rescaling,
    ) -> None:
        self._session = opened
        self._rescaling = rescaling
        self._surveys = surveys
        self._report = report
        self._progress = progress
        model, config = opened.model, opened.config
        self._calls = opened.calls + _extra_calls(model, opened.calls, config, report, progress)
        self._tuning = ScaleTuning(model, self._calls, config, report, progress)
        planned = planned_bytes(surveys, growth_of(self._calls), config)
        planned += planned_tuning_bytes(surveys, self._calls, 1.0, config) if self._tuning.wanted else 0
        report.planned_memory_bytes = opened.memory.bytes() + planned
        self._weights = _row_weights(model, self._calls, surveys, config, report, progress)
        self._biases = own_biases(model, opened.eligible.linears.values())
        self._finder = FoldFinder(foldable_norms(model))
        self._padded: list[str] = []

    @contextmanager
    def blocks(self) -> Iterator[Iterator[_Block]]:
        """Run all batches in lockstep: the body gets block after block."""
        with self._session.visits(self._surveys, self._calls) as visits, self._bar() as bar:
            yield self._each(visits, bar)
        self._report.warnings += warnings_for(self._padded)

    def _each(self, visits: Iterator[tuple[BlockSurvey, list[Stop]]], bar: Progress) -> Iterator[_Block]:
        for surveyed, stops in visits:
            peak = format_bytes(self._session.memory.bytes())
            bar.note(f"{surveyed.block.name or 'whole model'}, peak {peak}")
            release_free_memory()
            if surveyed.groups:
                last = surveyed is self._surveys[-1]
                yield _Block(surveyed, stops, last or self._session.config.propagate == "quantized")
            bar.update()

    def collect(self, block: _Block) -> _Collected:
        """Collect statistics while the batches stream through the float block."""
        start = time.perf_counter()
        found, output = collect(block.surveyed, block.stops, self._session.device, block.hold, self._weights)
        self._report.calibration_seconds += time.perf_counter() - start
        self._padded += [name for group in found for name in group.including_padding]
        return _Collected(found, output)

    def solve(self, block: _Block, collected: _Collected) -> list[GroupSolution]:
        """Find the scales, folds and codes of the block; the model stays as it is."""
        start = time.perf_counter()
        first = block.stops[0]
        probe = Probe(first.run_on_copies, collected.output, first.call.row_mask)
        solver = BlockSolver(
            block.surveyed, collected.statistics, probe, self._session.config, self._finder, self._biases
        )
        groups, block_report = solver.solve()
        self._report.blocks.append(block_report)
        if block_report.note:
            self._report.warnings.append(f"block {block_report.name or '(whole model)'}: {block_report.note}")
        self._report.search_seconds += time.perf_counter() - start
        return groups

    def swap(self, block: _Block, groups: Sequence[GroupSolution]) -> None:
        """Put int4 layers in place of the block's Linears, and apply the folds."""
        if not block.hold:
            block.stops[0].advance()  # through the float block, as the other batches did
        journal, report = self._session.journal, self._report
        report.warnings += _problems(groups)
        for (module, name), values in combined(_changes(groups)).items():
            journal.write_tensor(module._parameters[name], values)
        for group in groups:
            report.layers.extend(group.reports())
            for layer in group.layers:
                built = build_layer(layer, group.fold)
                if isinstance(built, QuantLinear):
                    built.rescaled = self._rescaling.factor(layer.task.name, layer.task.linear.weight)
                journal.set_module(self._session.model, layer.task.name, self._tuning.layer(layer, built))
                report.quantized_parameters += layer.task.linear.weight.numel()

    def tune(self) -> None:
        """Tune the scales of all layers end to end, if that is wanted."""
        self._tuning.finish(self._surveys, self._session.journal)

    def _bar(self) -> Progress:
        if self._progress:
            say(f"{len(self._surveys)} blocks, planned peak memory {format_bytes(self._report.planned_memory_bytes)}")
        return Progress(len(self._surveys), "quantizing", "block", self._progress)


def _finish(opened: Session, surveys: Sequence[BlockSurvey], report: AwqReport) -> None:
    """Put the original layers back where their stand-ins stay float, and complete the report."""
    opened.standins.put_back(opened.model, opened.journal)
    report.peak_memory_bytes = opened.memory.bytes()
    for name, reason in reasons_to_stay(opened.eligible, surveys).items():
        report.layers.append(LayerReport(name, 0, 0, "float", note=reason))
    report.notes += opened.standins.notes() + _heads(opened)
    report.warnings += opened.standins.warnings(report.parameters)


def _heads(opened: Session) -> list[str]:
    """Tell what quantized output layers take; one that was tied is new beside the embedding."""
    model, tied = opened.model, opened.standins.tied
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    return [
        f"{name}: {format_bytes(layer.nbytes)} {'beside' if name in tied else 'in place of'} "
        f"{format_bytes(layer.in_features * layer.out_features * layer.dtype.itemsize)} in float"
        f"{', which are the embedding alone now' if name in tied else ''}"
        for name, layer in heads_among(model, layers).items()
    ]


def _warn_of_few_tokens(opened: Session) -> None:
    """Warn where a model that reads token ids is calibrated on few of them; plain rounding does not look at them."""
    config = opened.config
    settings = (config, *(config.for_layer(name) for name in opened.eligible.linears))
    if input_embeddings(opened.model) is None or all(one.method == "rtn" for one in settings):
        return
    tokens = sum(call.tokens for call in opened.calls)
    if 0 < tokens < _FEW_TOKENS:
        warn(
            f"{tokens:,} calibration tokens are few: from about {_FEW_TOKENS:,} on the statistics of channels are steady "
            "(32 windows of 512 tokens are usual)"
        )


def _extra_calls(
    model: nn.Module, calls: Sequence[Call], config: AwqConfig, report: AwqReport, progress: bool
) -> list[Call]:
    """Make batches in addition to those given: of random tokens, and of text that the model generates if it can."""
    drawn = random_calls(model, calls, config.random_share)
    try:
        written = generated_calls(model, calls, config.generated_share, progress and draws_bars())
    except Exception as error:  # the calls that were given will show whether the model works
        written = []
        report.notes.append(f"the model could not write text to calibrate on: {type(error).__name__}: {error}")
    kinds = [(drawn, "of random tokens"), (written, "that the model wrote")]
    added = " and ".join(f"{len(made)} {kind}" for made, kind in kinds if made)
    if added:
        report.notes.append(f"calibrated on {len(calls)} batches, and on {added}")
    return drawn + written


def _row_weights(
    model: nn.Module,
    calls: Sequence[Call],
    surveys: Sequence[BlockSurvey],
    config: AwqConfig,
    report: AwqReport,
    progress: bool,
) -> Weights | None:
    """Weigh the calibration rows by how strongly the model's output reacts to errors in them; None if all count alike."""
    if not config.weighs_rows:
        return None
    asked = config.objective is not None
    try:
        return find_weights(
            model, calls, surveys, config.weighed_batches, progress and draws_bars(), of_tokens=not asked
        )
    except Exception as error:  # a model need not have gradients to be quantized
        if asked:
            raise
        report.notes.append(f"all calibration rows count alike: {type(error).__name__}: {error}")
        return None


def _changes(groups: Sequence[GroupSolution]) -> list[Change]:
    """List the changes to biases and norms. Corrections of biases come first, because a fold divides the corrected bias."""
    changes = [change for group in groups for layer in group.layers for change in layer.changes()]
    for group in groups:
        if group.fold is not None:
            # not the rows of a Linear: its codes were made of the divided rows
            rows = (group.fold.module, "weight") if isinstance(group.fold, LinearFold) else None
            changes += [one for one in group.fold.changes(group.choice.scale) if one[:2] != rows]
    return changes


def _problems(groups: Sequence[GroupSolution]) -> list[str]:
    """Write one warning for each group and problem, but a single one for all experts that saw too few rows."""
    named: dict[Any, list[str]] = {}
    for group in groups:
        for layer in group.layers:
            few = layer.seldom_called and layer.task.name in group.task.group.experts
            key = "" if few else (group.task.group.linears, layer.task.problem)
            if layer.task.problem:
                named.setdefault(key, []).append(
                    f"{layer.task.name} ({layer.task.input.rows})" if few else layer.task.name
                )
    texts = {key: key[1] if key else "experts that fewer than min_tokens calibration rows reached" for key in named}
    return [f"{', '.join(names)}: {texts[key]}; rounded to nearest instead" for key, names in named.items()]
