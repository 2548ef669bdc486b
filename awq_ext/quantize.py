"""quantize(): the one public verb. From a float model and calibration samples to int4 layers, in place."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .backend import kernels_for
from .batches import Call, read_calls
from .blocks import Block, CalibrationError, Stop, find_blocks, lockstep
from .calibrate import BlockSurvey, collect, linears_of, survey
from .config import AwqConfig
from .fold import LinearFold
from .groups import Eligible, eligible_linears, norm_candidates, parameter_owners
from .journal import Journal
from .memory import PeakMemory, format_bytes, release_free_memory
from .probe import Probe, combined
from .report import AwqReport, LayerReport
from .solve import BlockSolver, GroupSolution, build_layer


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
    any exception, KeyboardInterrupt included, the model is bit for bit what it was.
    """
    if not isinstance(config, (AwqConfig, type(None))):
        raise TypeError(f"config is a {type(config).__name__}: an AwqConfig is needed")
    if type(model) is nn.Linear:
        raise ValueError(
            "model is a bare Linear, which has no place to put another layer: wrap it, nn.Sequential(linear)"
        )
    config = replace(config or AwqConfig(), **overrides)
    started = time.perf_counter()
    eligible = eligible_linears(model, lambda name: any(fnmatchcase(name, pattern) for pattern in config.skip))
    if not eligible.linears:
        raise ValueError(
            f"no Linear is left to quantize: {'; '.join(f'{n}: {r}' for n, r in eligible.reasons.items())}"
        )
    device = next(iter(eligible.linears.values())).weight.device
    calls = read_calls(calib_loader, device, tokenizer, inputs, config.seq_len)
    report = AwqReport(config=config.to_dict(), parameters=sum(p.numel() for p in model.parameters()))
    # tensors made in inference mode could never be trained around
    with torch.inference_mode(False), Journal() as journal, calibration_mode(model), torch.no_grad():
        memory = PeakMemory(device)
        surveys = _survey(model, calls, eligible, blocks)
        report.planned_memory_bytes = memory.bytes() + planned_bytes(surveys, calls, config)
        run = _Run(model, config, device, journal, report, _foldable_norms(model))
        with _bar(surveys, report, progress) as bar:
            run.all_blocks(surveys, calls, memory, bar)
        report.peak_memory_bytes = memory.bytes()
        _report_float_layers(report, eligible, [s.block for s in surveys])
        report.seconds = time.perf_counter() - started
        for text in report.warnings:
            warnings.warn(text, UserWarning, stacklevel=2)
        # last, so that an exception until here (a warning may be one) leaves no report behind
        model.awq_report = report
    return model


def planned_bytes(surveys: Sequence[BlockSurvey], calls: Sequence[Call], config: AwqConfig) -> int:
    """Memory that quantizing adds to what one plain forward of the first batch needs.

    Hidden states of all batches at one block boundary + statistics of the largest block + the int4 layers made so far (the
    float ones stay until the end, so that everything can be taken back) + scratch of one block: its largest second moment
    packed for the kernels, its quantized weights in float for trials, its codes twice (with and without clips).
    """
    growth = sum(call.elements for call in calls) / max(calls[0].elements, 1)
    hidden = max(s.input_bytes for s in surveys) * growth
    statistics = max(s.statistics_bytes for s in surveys)
    weights = [linear.weight for s in surveys for linear in s.linears.values()]
    made = sum(0.6 * w.numel() if config.packed else w.nbytes for w in weights)
    return int(hidden + statistics + made + max(s.scratch_bytes for s in surveys))


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
    ) -> None:
        self.model = model
        self.config = config
        self.device = device
        self.journal = journal
        self.report = report
        self.foldable = foldable
        self.kernels = kernels_for(device)

    def all_blocks(self, surveys: Sequence[BlockSurvey], calls: Sequence[Call], memory: PeakMemory, bar: tqdm) -> None:
        """Calibrate, solve and swap block after block, all batches in lockstep."""
        with lockstep(self.model, [s.block for s in surveys], calls) as visits:
            for surveyed, (block, stops) in zip(surveys, visits, strict=True):
                bar.set_postfix_str(f"{block.name or 'whole model'}, peak {format_bytes(memory.bytes())}")
                release_free_memory()
                if surveyed.groups:
                    self._one_block(surveyed, stops, last=surveyed is surveys[-1])
                bar.update()

    def _one_block(self, surveyed: BlockSurvey, stops: list[Stop], last: bool) -> None:
        hold = last or self.config.propagate == "quantized"
        start = time.perf_counter()
        books, output = collect(surveyed, stops, self.kernels, self.device, hold)
        collected = time.perf_counter()
        probe = Probe(stops[0].rehearse, output, stops[0].call.row_mask)
        groups, block_report = BlockSolver(surveyed, books, probe, self.kernels, self.config, self.foldable).solve()
        self.report.blocks.append(block_report)
        self.report.calibration_seconds += collected - start
        self.report.search_seconds += time.perf_counter() - collected
        if not hold:
            stops[0].advance()
        self._swap(groups)

    def _swap(self, groups: Sequence[GroupSolution]) -> None:
        for group in groups:
            self.report.layers.extend(group.reports(self.config))
            if group.problem:
                names = ", ".join(layer.name for layer in group.layers)
                self.report.warnings.append(f"{names}: {group.problem}; rounded to nearest instead")
            if group.fold is not None:
                for (module, name), values in combined(group.fold.changes(group.choice.scale)).items():
                    # a Linear's divided rows are in its codes
                    if not (isinstance(group.fold, LinearFold) and name == "weight"):
                        self.journal.write_tensor(module._parameters[name], values)
            for layer in group.layers:
                self.journal.set_module(self.model, layer.name, build_layer(layer, group.fold, self.config))
                self.report.quantized_parameters += layer.linear.weight.numel()


def _survey(
    model: nn.Module, calls: Sequence[Call], eligible: Eligible, names: Sequence[str] | None
) -> list[BlockSurvey]:
    blocks = find_blocks(model) if names is None else _named_blocks(model, names)
    surveys = survey(model, blocks, eligible.linears, calls[0])
    called = {s.block.name for s in surveys}
    if names and "" not in called and (unseen := {block.name for block in blocks} - called):
        raise CalibrationError(f"the first calibration batch did not call the given blocks {', '.join(sorted(unseen))}")
    if not any(s.groups for s in surveys):
        raise CalibrationError(
            "the first calibration batch reached no Linear that can be quantized: "
            f"{len(eligible.linears)} are eligible, among them {next(iter(eligible.linears))}"
        )
    return surveys


def _named_blocks(model: nn.Module, names: Sequence[str]) -> list[Block]:
    if isinstance(names, str):
        raise TypeError(f"blocks={names!r}: a sequence of module names is needed")
    modules = dict(model.named_modules(remove_duplicate=False))
    for position, name in enumerate(names):
        if name not in modules:
            raise ValueError(f"blocks: {type(model).__name__} has no module {name!r}")
        for other in names[:position]:
            if f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                raise ValueError(f"blocks: {other!r} and {name!r} overlap")
    return [Block(name, modules[name]) for name in names] or [Block("", model)]


def _foldable_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Norm candidates whose parameters belong to them alone, by name."""
    owners = parameter_owners(model)
    return {
        name: module
        for name, module in norm_candidates(model).items()
        if all(len(owners[id(p)]) == 1 for p in module.parameters())
    }


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """eval mode, and no key/value cache for models that have the switch (every suspended forward would hold one)."""
    training = [(name, module, module.training) for name, module in model.named_modules()]
    owners = {id(c): c for m in model.modules() if getattr(c := getattr(m, "config", None), "use_cache", None)}
    caching = [(config, config.use_cache) for config in owners.values()]  # an encoder and a decoder may have one each
    try:
        model.eval()
        for config, _ in caching:
            config.use_cache = False
        yield
    finally:
        # by name too: a module that took the place of another takes over its flag
        for name, module, flag in training:
            module.training = model.get_submodule(name).training = flag
        for config, use_cache in caching:
            config.use_cache = use_cache


def _bar(surveys: Sequence[BlockSurvey], report: AwqReport, progress: bool) -> tqdm:
    planned = format_bytes(report.planned_memory_bytes)
    if progress:
        tqdm.write(f"awq_ext: {len(surveys)} blocks, planned peak memory {planned}")
    return tqdm(total=len(surveys), desc="quantizing", unit="block", disable=not progress)


def _report_float_layers(report: AwqReport, eligible: Eligible, blocks: Sequence[Block]) -> None:
    inside = {name for block in blocks for name in linears_of(block, eligible.linears)}
    done = {layer.name for layer in report.layers}
    uncalled = {
        name: "not called by the first calibration batch" if name in inside else "outside the calibrated blocks"
        for name in eligible.linears
        if name not in done
    }
    for name, reason in (eligible.reasons | uncalled).items():
        report.layers.append(LayerReport(name, 0, 0, "float", note=reason))
