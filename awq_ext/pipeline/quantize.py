"""quantize(): the one public verb. From a float model and calibration samples to int4 layers, in place."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..calibration.extra_batches import generated_calls, random_calls
from ..calibration.importance import find_weights
from ..calibration.padding import warnings_for
from ..calibration.row_weights import Weights
from ..calibration.statistics import collect
from ..config import AwqConfig, configured
from ..folding.finder import FoldFinder
from ..folding.fold import Change, LinearFold
from ..forwards.calls import Call, read_calls
from ..forwards.lockstep import Stop, lockstep
from ..forwards.memory import PeakMemory, release_free_memory
from ..forwards.mode import calibration_mode
from ..forwards.probe import Probe, combined
from ..kernels import kernels_for
from ..modules import foldable_norms, unwrapped
from ..reporting.report import AwqReport, LayerReport
from ..reporting.tables import format_bytes
from ..solving.bias import own_biases
from ..solving.block_solver import BlockSolver
from ..solving.solution import GroupSolution, build_layer
from ..survey.budget import growth_of, planned_bytes
from ..survey.selection import check_layers, select_linears
from ..survey.survey import BlockSurvey, reasons_to_stay, survey_model
from ..undo import interrupt
from ..undo.journal import Journal
from ..undo.thread_state import restoring


@restoring
def quantize(
    model: nn.Module,
    calib_loader: Iterable[Any],
    config: AwqConfig | None = None,
    *,
    tokenizer: Callable[..., Any] | None = None,
    inputs: str | Callable[[Any], Any] = "all",
    blocks: Sequence[str] | None = None,
    progress: bool = True,
    **overrides: Any,
) -> nn.Module:
    """Quantize the Linears of ``model`` to int4, in place, by activation-aware weight quantization (arXiv 2306.00978).

    model: any nn.Module with nn.Linear inside, float32, bfloat16 or float16. On the CPU the compiled kernels work; on another
        device plain torch does, on that device.
    calib_loader: iterable of samples, each a Tensor, a tuple or list (positional arguments), a mapping (keywords; rows that
        ``attention_mask`` marks 0 do not count) or, with ``tokenizer``, a str. Tensors are moved to the model's device.
    inputs: "all"; "first" for loaders of (input, label) pairs; or a function of a sample.
    blocks: names of the modules to calibrate one after another; None finds them, [] takes the model as a whole.
    overrides: fields of :class:`AwqConfig`, such as ``group_size=64``.

    Returns ``model``, with QuantLinear in place of nn.Linear and ``model.awq_report`` telling what was done. Raises ValueError
    or TypeError for unusable arguments, CalibrationError when the model rejects a batch, whatever the loader raises. After
    any exception, KeyboardInterrupt included, the model is bit for bit what it was. A Ctrl-C comes within a forward of a block or
    the search of a layer; a second one comes at once. One that comes when all is done leaves the quantized model.
    """
    given, model = model, unwrapped(model)
    config = configured(config, overrides)
    started = time.perf_counter()
    device = check_layers(model, config)
    calls = read_calls(calib_loader, device, tokenizer, inputs, config.seq_len)
    report = AwqReport(config=config.to_dict(), parameters=sum(p.numel() for p in model.parameters()))
    # tensors made in inference mode could never be trained around
    with interrupt.held(), torch.inference_mode(False), Journal() as journal, torch.no_grad():
        memory = PeakMemory(device)
        eligible, standins = select_linears(model, calls[0], config, journal)
        with calibration_mode(model):
            calls += _own_calls(model, calls, config, report, progress)
            surveys = survey_model(model, calls[0], eligible, blocks, config)
            report.planned_memory_bytes = memory.bytes() + planned_bytes(surveys, growth_of(calls), config)
            weights = _weights(model, calls, surveys, config, report, progress)
            biases = own_biases(model, eligible.linears.values())
            run = _Run(model, config, device, journal, report, foldable_norms(model), biases, weights)
            with _bar(surveys, report, progress) as bar:
                run.all_blocks(surveys, calls, memory, bar)
        standins.put_back(model, journal)
        report.peak_memory_bytes = memory.bytes()
        for name, reason in reasons_to_stay(eligible, surveys).items():
            report.layers.append(LayerReport(name, 0, 0, "float", note=reason))
        report.notes += standins.notes()
        report.warnings += standins.warnings(report.parameters)
        report.seconds = time.perf_counter() - started
        for text in report.warnings:
            warnings.warn(text, UserWarning, stacklevel=3)  # past restoring()
        interrupt.check()
        # last, so that an exception until here (a warning may be one) leaves no report behind
        model.awq_report = report
    return given


def _own_calls(
    model: nn.Module, calls: Sequence[Call], config: AwqConfig, report: AwqReport, progress: bool
) -> list[Call]:
    """Calls to calibrate on beside those given: random tokens, and text that the model writes where it can."""
    drawn = random_calls(model, calls, config.random_share)
    try:
        written = generated_calls(model, calls, config.generated_share, progress)
    except Exception as error:  # the calls that were given will show whether the model works
        written = []
        report.notes.append(f"the model could not write text to calibrate on: {type(error).__name__}: {error}")
    kinds = [(drawn, "of random tokens"), (written, "that the model wrote")]
    added = " and ".join(f"{len(made)} {kind}" for made, kind in kinds if made)
    if added:
        report.notes.append(f"calibrated on {len(calls)} batches, and on {added}")
    return drawn + written


def _weights(
    model: nn.Module,
    calls: Sequence[Call],
    surveys: Sequence[BlockSurvey],
    config: AwqConfig,
    report: AwqReport,
    progress: bool,
) -> Weights | None:
    """By which the rows of all calls count; None: all alike."""
    if not config.weighs_rows:
        return None
    asked = config.objective is not None
    try:
        return find_weights(model, calls, surveys, config.weighed_batches, progress, of_tokens=not asked)
    except Exception as error:  # a model need not have gradients to be quantized
        if asked:
            raise
        report.notes.append(f"all calibration rows count alike: {type(error).__name__}: {error}")
        return None


class _Run:
    """The state of one quantize() call."""

    def __init__(
        self,
        model: nn.Module,
        config: AwqConfig,
        device: torch.device,
        journal: Journal,
        report: AwqReport,
        foldable: dict[str, nn.Module],
        biases: set[nn.Linear],
        weights: Weights | None,
    ) -> None:
        self.model = model
        self.config = config
        self.device = device
        self.journal = journal
        self.report = report
        self.finder = FoldFinder(foldable)
        self.biases = biases
        self.weights = weights
        self.kernels = kernels_for(device)
        self.including_padding: list[str] = []

    def all_blocks(self, surveys: Sequence[BlockSurvey], calls: Sequence[Call], memory: PeakMemory, bar: tqdm) -> None:
        """Calibrate, solve and swap block after block, all batches in lockstep."""
        with lockstep(self.model, [s.block for s in surveys], calls) as visits:
            for surveyed, (block, stops) in zip(surveys, visits, strict=True):
                bar.set_postfix_str(f"{block.name or 'whole model'}, peak {format_bytes(memory.bytes())}")
                release_free_memory()
                if surveyed.groups:
                    self._one_block(surveyed, stops, last=surveyed is surveys[-1])
                bar.update()
        self.report.warnings += warnings_for(self.including_padding)

    def _one_block(self, surveyed: BlockSurvey, stops: list[Stop], last: bool) -> None:
        hold = last or self.config.propagate == "quantized"
        start = time.perf_counter()
        books, output = collect(surveyed, stops, self.kernels, self.device, hold, self.weights)
        collected = time.perf_counter()
        self.including_padding += [name for book in books for name in book.including_padding]
        probe = Probe(stops[0].run_on_copies, output, stops[0].call.row_mask)
        solver = BlockSolver(surveyed, books, probe, self.kernels, self.config, self.finder, self.biases)
        groups, block_report = solver.solve()
        self.report.blocks.append(block_report)
        if block_report.note:
            self.report.warnings.append(f"block {block_report.name or '(whole model)'}: {block_report.note}")
        self.report.calibration_seconds += collected - start
        self.report.search_seconds += time.perf_counter() - collected
        if not hold:
            stops[0].advance()
        self._swap(groups)

    def _swap(self, groups: Sequence[GroupSolution]) -> None:
        self.report.warnings += _problems(groups)
        for (module, name), values in combined(_changes(groups)).items():
            self.journal.write_tensor(module._parameters[name], values)
        for group in groups:
            self.report.layers.extend(group.reports())
            for layer in group.layers:
                self.journal.set_module(self.model, layer.name, build_layer(layer, group.fold))
                self.report.quantized_parameters += layer.linear.weight.numel()


def _changes(groups: Sequence[GroupSolution]) -> list[Change]:
    """What becomes of biases and norms. Corrections first: a fold divides the bias as it is with them."""
    changes = [change for group in groups for layer in group.layers for change in layer.changes()]
    for group in groups:
        if group.fold is not None:
            # a Linear's divided rows are in its codes
            rows = (group.fold.module, "weight") if isinstance(group.fold, LinearFold) else None
            changes += [one for one in group.fold.changes(group.choice.scale) if one[:2] != rows]
    return changes


def _problems(groups: Sequence[GroupSolution]) -> list[str]:
    """One warning for each group and problem, but one for all experts that saw too few rows."""
    named: dict[Any, list[str]] = {}
    for group in groups:
        for layer in group.layers:
            few = layer.seldom_called and layer.name in group.group.experts
            key = "" if few else (group.group.linears, layer.problem)
            if layer.problem:
                named.setdefault(key, []).append(f"{layer.name} ({layer.book.rows})" if few else layer.name)
    texts = {key: key[1] if key else "experts that fewer than min_tokens calibration rows reached" for key in named}
    return [f"{', '.join(names)}: {texts[key]}; rounded to nearest instead" for key, names in named.items()]


def _bar(surveys: Sequence[BlockSurvey], report: AwqReport, progress: bool) -> tqdm:
    planned = format_bytes(report.planned_memory_bytes)
    if progress:
        tqdm.write(f"awq_ext: {len(surveys)} blocks, planned peak memory {planned}")
    return tqdm(total=len(surveys), desc="quantizing", unit="block", disable=not progress)
