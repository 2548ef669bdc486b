"""quantize(): from a float model and calibration samples to int4 layers, in place."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from ..calibration.builtin import builtin_calibration, is_builtin
from ..calibration.windows import count_tokens
from ..config import AwqConfig, by_effort, configured
from ..distributed.launch import TIMEOUT
from ..distributed.team import leads, teamed
from ..forwards.calls import Call
from ..forwards.forked import finishing_after_fork
from ..layers.announcement import announce
from ..layers.quant_linear import QuantLinear
from ..layers.sizes import model_bytes
from ..modules import heads_among, input_embeddings, unwrapped
from ..reporting.model_card import base_name
from ..reporting.origin import call_text, now, versions
from ..reporting.report import AwqReport, LayerReport
from ..reporting.tables import format_bytes
from ..reporting.warn import warn
from ..survey.survey import BlockSurvey, reasons_to_stay
from ..undo import interrupt
from ..undo.thread_state import restoring
from ..workdir.directory import opened as work_directory
from .keeping import Keeping
from .rescaled import Rescaling
from .run import Run
from .session import Session, session
from .shared_keeping import SharedKeeping, keeping_for
from .shared_run import SharedRun


@finishing_after_fork
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
    resume: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    distributed: bool = True,
    timeout: float = TIMEOUT,
    **overrides: Any,
) -> nn.Module:
    """Quantize the Linears of ``model`` to int4, in place, by activation-aware weight quantization (arXiv 2306.00978).

    model: any nn.Module with nn.Linear inside, float32, bfloat16 or float16. Compiled kernels run on the CPU, plain torch on any
        other device.
    calib_loader: iterable of samples. Each is a Tensor, a tuple or list (positional arguments), a mapping (keywords; rows that
        ``attention_mask`` marks 0, or torch's ``src_key_padding_mask`` True, do not count) or a list of token ids. With
        ``tokenizer`` it may also be a str, a list of messages, or a row of a data set with "text", "messages", "conversations" or
        "prompt" and "completion". A str is the text itself: the name of a file that is there is refused. Tensors are moved to the
        model's device. "builtin" in place of samples (with ``tokenizer``) is a small mix of languages and code that ships with the
        package. Your own text is better.
    tokenizer: turns texts and chats into token ids; needed for these, and for ``builtin_text``.
    inputs: what the model is called with: "all" of a sample; "first" for loaders of (input, label) pairs; or a function of it.
    blocks: names of the modules to calibrate one after another; None finds them, [] takes the model as a whole.
    progress: whether a bar is shown.
    resume: a directory for finished blocks, made if need be. After an interrupt of any kind, SIGKILL and power cuts included, the
        same call on the same float model goes on after the last finished block, and ends with the result of an uninterrupted call.
        The directory stays: remove it once the model is saved. fresh: True removes what is in it first.
    distributed: in an initialized ``torch.distributed`` group of several processes all of them make this call, with the same
        arguments, and share the work: each gets the layers of one process, bit for bit; process 0 writes ``resume``. False: this
        process works alone. timeout: seconds without a sign of life after which a process counts as dead.
    config, overrides: an :class:`AwqConfig` or a dict of its fields (or AutoAWQ's), and fields by name, such as ``group_size=64``.

    Returns ``model``, with QuantLinear in place of nn.Linear. ``model.awq_report`` says what was done. A Transformers model
    also writes whole quantized checkpoints with its own ``save_pretrained``. Raises ValueError or TypeError for unusable arguments,
    CalibrationError when the model rejects a batch, ResumeError for a directory with the work of another call (other weights,
    batches, settings or versions) or of a running process, TeamError where another of several processes failed or is gone, and
    whatever the loader raises. After any exception, KeyboardInterrupt included, the model is bit for bit what it was. A Ctrl-C
    takes effect after the current forward of a block or search of a layer; a second one takes effect at once. One that comes when
    all is done leaves the quantized model.
    """
    if fresh and resume is None:
        raise ValueError("fresh=True starts a work directory over: name it with resume=")
    options = {"tokenizer": tokenizer, "inputs": inputs, "blocks": blocks, "progress": progress}
    with teamed(timeout, distributed) as team:
        kept = resume is not None and leads(team)
        with work_directory(resume, fresh) if kept else nullcontext() as work:
            return quantize_in(keeping_for(team, work), model, calib_loader, configured(config, overrides), **options)


def quantize_in(
    keeping: Keeping,
    model: nn.Module,
    calib_loader: Iterable[Any],
    config: AwqConfig,
    *,
    tokenizer: Callable[..., Any] | None = None,
    inputs: str | Callable[[Any], Any] = "all",
    blocks: Sequence[str] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Do what :func:`quantize` does, with what is finished and what need not be in memory kept as ``keeping`` says."""
    given, model = model, unwrapped(model)
    builtin_alone = is_builtin(calib_loader)
    if builtin_alone:
        calib_loader, config = builtin_calibration(tokenizer, config)
    started = time.perf_counter()
    report = _begun(model, config)
    rescaling = Rescaling(model)
    with (
        keeping.measured() as memory,
        session(model, calib_loader, config, tokenizer, inputs, undo=False, memory=memory) as opened,
    ):
        _tell_calibration(report, opened, builtin_alone, tokenizer is not None)
        _warn_at_once(report, opened, keeping.tells)
        keeping.begin(model, opened.calls + opened.builtin, config, blocks)
        with opened.surveyed(blocks) as surveys:
            _warn_of_groups(report, opened, surveys, keeping.tells)
            run = (SharedRun if isinstance(keeping, SharedKeeping) else Run)(
                opened, surveys, report, progress, rescaling, keeping
            )
            run.all_blocks()
            run.tune()
        _finish(opened, surveys, report)
        report.peak_memory_bytes = max(opened.memory.bytes(), keeping.peak_before)
        report.seconds = keeping.seconds_before + time.perf_counter() - started
        for text in report.warnings[len(opened.warnings) :] if keeping.tells else ():
            warn(text)
        interrupt.check()
        # last, so that an exception until here (a warning may be one) leaves nothing behind
        announce(model)
        model.awq_report = report
    return given


def _tell_calibration(report: AwqReport, opened: Session, builtin_alone: bool, tokenizer: bool) -> None:
    """Tell what the model is calibrated on, and the call that would do so again."""
    given, builtin = _tokens(opened, opened.calls), _tokens(opened, opened.builtin)
    report.calibration_tokens, report.builtin_tokens = given, given if builtin_alone else builtin
    report.notes += opened.notes + _too_short(opened) + _changes_nothing(opened.config)
    report.warnings += opened.warnings
    # which is denied where they were to take part, but could not
    report.config["builtin_text"] = opened.config.builtin_text
    report.command = call_text(by_effort(report.config), AwqConfig().to_dict(), tokenizer)


def _too_short(opened: Session) -> list[str]:
    """Note a limit of text that leaves error feedback less than one token for each channel of its widest Linear.

    Then most of what it gains over AWQ alone is lost (docs/research-notes-tuning.md, "How much text?").
    """
    if not opened.limited:
        return []
    linears, tokens = opened.eligible.linears.items(), count_tokens([*opened.calls, *opened.builtin])
    widest = max((one.in_features for name, one in linears if opened.config.for_layer(name).uses_gptq), default=0)
    if tokens >= widest:
        return []
    return [
        f"{tokens:,} tokens are few for error feedback on Linears of {widest:,} input channels: "
        f"max_calib_tokens={2 * widest} takes two for each"
    ]


def _changes_nothing(config: AwqConfig) -> list[str]:
    """Note settings of an effort beside plain rounding, which reads no text and searches nothing."""
    if config.method != "rtn" or config.per_layer or not (config.builtin_text or config.learn_rounding):
        return []
    return ['method="rtn" rounds to nearest: nothing is searched or learned, so an effort changes nothing']


def _warn_at_once(report: AwqReport, opened: Session, tells: bool) -> None:
    """Warn before the work of what the caller may want to change first."""
    if report.few_tokens:
        warn(report.few_tokens)
    for text in opened.warnings if tells else ():
        warn(text)


def _warn_of_groups(report: AwqReport, opened: Session, surveys: Sequence[BlockSurvey], tells: bool) -> None:
    """Warn before the work where scales are folded for the formats of other tools, and groups fit none of them."""
    names = [name for one in surveys for group in one.groups for name in group.linears]
    found = [(name, opened.eligible.linears[name].in_features, opened.config.for_layer(name)) for name in names]
    widths = [(name, width, one.group_size) for name, width, one in found if one.packed and one.group_size != -1]
    odd = [(name, width, size) for name, width, size in widths if width > size and width % size]
    if opened.config.fold != "always" or not odd:
        return
    (name, width, size), others = odd[0], f" and {len(odd) - 1} more layers" if len(odd) > 1 else ""
    fits = next((one for one in (64, 32, 16) if not any(width % one for _, width, _ in widths)), -1)
    text = (
        f"groups of {size} do not divide the {width} inputs of {name}{others}, which formats of other tools cannot hold, "
        f'"gptq" excepted, and fold="always" is for these formats: group_size={fits} divides all widths'
    )
    opened.warnings.append(text)
    report.warnings.append(text)
    if tells:
        warn(text)


def _finish(opened: Session, surveys: Sequence[BlockSurvey], report: AwqReport) -> None:
    """Put the original layers back where their stand-ins stay float, and complete the report."""
    opened.standins.put_back(opened.model, opened.journal)
    report.bytes_after = model_bytes(opened.model, report=report)
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


def _begun(model: nn.Module, config: AwqConfig) -> AwqReport:
    """Begin a report: which model, when, by what, and how large it is."""
    name = base_name(getattr(getattr(model, "config", None), "_name_or_path", ""))
    return AwqReport(
        model=name or type(model).__name__,
        date=now(),
        versions=versions(),
        config=config.to_dict(),
        parameters=sum(p.numel() for p in model.parameters()),
        bytes_before=model_bytes(model),
    )


def _tokens(opened: Session, calls: Sequence[Call]) -> int:
    """Count the token ids of calls on which the model is calibrated; 0 where it reads none, or every layer is only rounded."""
    config = opened.config
    settings = (config, *(config.for_layer(name) for name in opened.eligible.linears))
    if input_embeddings(opened.model) is None or all(one.method == "rtn" for one in settings):
        return 0
    return sum(call.tokens for call in calls)
