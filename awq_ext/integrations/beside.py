"""Say whether a layout holds a model, and write what lies beside the weights: the report and the model card."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.convert import card
from ..checkpoints.formats import LAYOUTS, CheckpointError, Layout, Summary
from ..checkpoints.model_source import config_of, float_linears, origin
from ..checkpoints.renaming import Renamed
from ..checkpoints.saved import write_report
from ..checkpoints.write import is_quantized, summarize
from ..reporting.model_card import (
    BASE_CARD,
    MARK,
    Card,
    base_name,
    base_of,
    inherited_from,
    is_ours,
    read_card,
    write_card,
)
from ..reporting.report import AwqReport
from ..reporting.scores import Scores

# what is tried where a layout cannot hold a model: one that other tools read, and the one that holds all
_WIDER = ("compressed-tensors", "native")


def summary_for(source: Renamed, model: nn.Module, layout: Layout) -> Summary:
    """Summarize a model for ``layout``. CheckpointError that names the call for one which can hold it, where this cannot."""
    floats = float_linears(model)
    linears = list(source.linears(floats))
    try:
        return summarize(source, layout, linears, renamed=source.renamed(floats))
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


def _with_base(made: Card, model: Any, to: Path, target: Path) -> Card:
    """Let a card say what that of the model's origin does: a float model's is put beside it, of one of ours it is the heir."""
    place = origin(model)
    text = read_card(place)
    if place is not None and MARK in text:
        made = replace(made, base=base_of(place) or made.base)
    elif place is not None and text and not is_quantized(place) and is_ours(target) and is_ours(to):
        (to / BASE_CARD).write_text(text, encoding="utf-8")
    return replace(made, inherited=inherited_from(text), base_card=(to / BASE_CARD).exists())


def write_beside(
    model: Any,
    to: Path,
    source: Renamed,
    layout: Layout,
    summary: Summary,
    stored: int,
    target: Path | None = None,
    scores: Scores | None = None,
) -> None:
    """Write the report, the model card and the layout's own files into ``to``, which becomes ``target`` (None: is it).

    scores: more of them than the report has.
    """
    report = getattr(model, "awq_report", None)
    scores = (report.evaluations if isinstance(report, AwqReport) else {}) | (scores or {})
    report = replace(report, evaluations=scores) if isinstance(report, AwqReport) else None
    write_report(report, to)
    base = base_name(getattr(getattr(model, "config", None), "_name_or_path", ""))
    made = card(layout.name, source, summary, config_of(model), report, base, stored)
    write_card(to, _with_base(replace(made, scores=scores), model, to, target or to), target or to)
    for name, content in layout.files(summary).items():
        (to / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
