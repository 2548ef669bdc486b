"""Say whether a layout holds a model, and write what lies beside the weights: the report and the model card."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.convert import card
from ..checkpoints.formats import LAYOUTS, CheckpointError, Layout, Summary
from ..checkpoints.model_source import config_of, float_linears
from ..checkpoints.renaming import Renamed
from ..checkpoints.saved import write_report
from ..checkpoints.write import summarize
from ..reporting.model_card import base_name, write_card
from ..reporting.report import AwqReport

# what is tried where a layout cannot hold a model: one that other tools read, and the one that holds all
_WIDER = ("compressed-tensors", "native")


def summary_for(source: Renamed, model: nn.Module, layout: Layout) -> Summary:
    """Summarize a model for ``layout``. CheckpointError that names the call for one which can hold it, where this cannot."""
    linears = list(source.linears(float_linears(model)))
    try:
        return summarize(source, layout, linears)
    except CheckpointError as error:
        for name in _WIDER:
            if name != layout.name and _holds(source, LAYOUTS[name], linears):
                call = f'awq_ext.save_pretrained(model, directory, format="{name}")'
                raise CheckpointError(f"{error}\nas it is, the model can be saved by {call}") from None
        raise


def _holds(source: Renamed, layout: Layout, linears: list[str]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            summarize(source, layout, linears)
        except CheckpointError:
            return False
    return True


def write_beside(
    model: Any, to: Path, source: Renamed, layout: Layout, summary: Summary, stored: int, target: Path | None = None
) -> None:
    """Write the report, the model card and the layout's own files into ``to``, which becomes ``target`` (None: is it)."""
    report = getattr(model, "awq_report", None)
    report = report if isinstance(report, AwqReport) else None
    write_report(report, to)
    config = config_of(model)
    base = base_name(getattr(getattr(model, "config", None), "_name_or_path", ""))
    write_card(to, card(layout.name, source, summary, config, report, base, stored), target or to)
    for name, content in layout.files(summary).items():
        (to / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
