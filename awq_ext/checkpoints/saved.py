"""Save and load quantized models bit for bit, in the native layout. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..forwards.forked import finishing_after_fork
from ..layers.announcement import announce
from ..modules import unwrapped
from ..reporting.model_card import put_scores
from ..reporting.report import AwqReport
from ..reporting.scores import plain_scores
from ..reporting.warn import warn
from .conversions import is_transformers_model
from .fill import place
from .formats import LAYOUTS, CheckpointError, ShapeError
from .model_source import ModelSource, config_of, float_linears, origin
from .quantized_dir import CONFIG, QuantDir, without_settings
from .renaming import Renamed
from .shards import first_json, read_json
from .version_1 import VERSION_1, read_version_1
from .write import REPORT, Overwrite, check_target, parse_size, summarize, write


@finishing_after_fork
def save(
    model: nn.Module, directory: str | os.PathLike[str], overwrite: Overwrite = False, verify: bool = False
) -> Path:
    """Write ``model`` (quantized) to ``directory`` in the native layout: config.json and safetensors. Returns the directory.

    All parameters and buffers are stored, those outside ``state_dict`` too (rotary tables), tied ones once. The directory is
    replaced as a whole, so a reader sees the old checkpoint or the new one, never a mixture; files in it that are no part of
    a checkpoint stay.
    overwrite: False refuses a directory that holds weights; True replaces a quantized checkpoint; the directory's own path replaces
        float weights too, but never those that the model was loaded from.
    verify: as for :func:`awq_ext.save_pretrained`.
    Raises CheckpointError, before anything is written, when the model holds no QuantLinear or tensors on the meta device, and
    for a directory that ``overwrite`` does not cover.
    """
    model, folder = unwrapped(model), Path(directory)
    allowed = partial(check_target, folder, overwrite, [origin(model)])
    allowed()
    source = ModelSource(model, whole=True)
    layout = LAYOUTS["native"]
    summary = summarize(source, layout, float_linears(model))
    report = getattr(model, "awq_report", None)

    write(
        folder,
        source,
        layout,
        summary,
        _config(model, folder),
        parse_size("5GB"),
        partial(write_report, report),
        allowed=allowed,
        verify=verify,
    )
    return folder


def write_report(report: object, folder: Path) -> None:
    """Write a model's ``awq_report``, if it is one, beside its weights."""
    if isinstance(report, AwqReport):
        (folder / REPORT).write_text(json.dumps(report.to_dict()), encoding="utf-8")


def record_scores(directory: str | os.PathLike[str], evaluations: Mapping[str, Any]) -> None:
    """Put evaluations by the name of their text into the report and the model card of a quantized directory, those there are."""
    folder, scores = Path(directory), plain_scores(evaluations)
    if (folder / REPORT).is_file():
        report = read_report(folder)
        scores = report.evaluations | scores
        write_report(replace(report, evaluations=scores), folder)
    put_scores(folder, scores)


def _config(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Make config.json of the checkpoint to be, with what that of ``folder`` says beside it."""
    if is_transformers_model(model):
        return config_of(model)
    before = dict(first_json(folder, CONFIG) or {})
    return without_settings(before) | config_of(model)


@finishing_after_fork
def load(model: nn.Module | Callable[[], nn.Module], directory: str | os.PathLike[str]) -> nn.Module:
    """Give ``model`` the quantized layers and all tensors of a checkpoint; returns it.

    directory: what :func:`save` wrote, or a checkpoint of any layout of ``checkpoints/formats`` whose tensors have the names
        that ``model`` has for them.
    model: the float model's structure (its values do not matter; ``torch.device("meta")`` is fine), or a function that builds
        it. Tensors land on the device of what they replace (meta: the CPU), with the bits and dtypes that were saved.
    Raises CheckpointError, before anything is changed, for a damaged or foreign checkpoint or one of another model.
    """
    given = model if isinstance(model, nn.Module) else model()
    try:
        fill_model(unwrapped(given), QuantDir(directory))
    except ShapeError as error:
        wrong = "the model given is another" if given is model else "the function builds another model"
        raise ShapeError(f"{error}: {wrong} than the one that was saved") from None
    return given


def fill_model(
    model: nn.Module,
    source: QuantDir,
    dtype: torch.dtype | None = None,
    ignore: Callable[[str], bool] | None = None,
) -> None:
    """Place all of ``source`` in ``model`` (see :func:`place`), the report that lies beside it included."""
    report = found_report(source)
    place(model, Renamed(source, model), dtype, ignore)
    if report is not None:
        model.awq_report = report
    announce(model, source.layout.name)


def found_report(source: QuantDir) -> AwqReport | None:
    """Read the report beside a checkpoint; None where there is none. A damaged one is an error in what :func:`save` wrote."""
    if not report_exists(source.folder):
        return None
    try:
        return read_report(source.folder)
    except CheckpointError as error:
        if source.in_memory is not None:
            raise
        warn(f"the model is loaded without its report: {error}")  # which may be of a newer version of this package
        return None


def report_exists(folder: Path) -> bool:
    """Whether :func:`read_report` has something to read."""
    old = read_version_1(folder)
    return old.report is not None if old is not None else (folder / REPORT).exists()


def read_report(directory: str | os.PathLike[str]) -> AwqReport:
    """Read the report of the quantization that made a checkpoint. CheckpointError where there is none, or a damaged one."""
    folder = Path(directory)
    if not report_exists(folder):
        raise CheckpointError(f"{folder} holds no report: awq_ext.save and awq-ext quantize write one ({REPORT})")
    old, path = read_version_1(folder), folder / REPORT
    path, values = (path, read_json(path)) if old is None else (folder / VERSION_1, old.report)
    try:
        return AwqReport.from_dict(values)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged, or of another version: {error}") from None
