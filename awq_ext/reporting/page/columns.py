"""Make the tables of the page: cells with what they are sorted by, and how warm they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..report import AwqReport, LayerReport
from ..scores import LARGE, measures_of
from ..sizes import stored_bits
from .layer_kinds import by_kind, kind_of

# evaluate()'s name of a measure -> heading
_MEASURES = {"kl": "KL, nats a token", "top1": "same likeliest token", "perplexity": "perplexity"}
# where scales went -> heading
_PLACES = {
    "norm": "a norm",
    "linear": "an earlier Linear",
    "weights": "its own weights",
    "run time": "run time",
    "": "no scale",
}


@dataclass(frozen=True)
class Column:
    """A heading; numbers stand to the right."""

    title: str
    number: bool = True


@dataclass(frozen=True)
class Cell:
    """Text; number: what it is sorted by (None: the text; an empty text is last); heat: 0 to 1, None for none; kind: of layer."""

    text: str
    number: float | None = None
    heat: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table that can be sorted by each of its columns."""

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


def number(value: float | None, shown: str = "{:.3g}", heat: float | None = None) -> Cell:
    """Make a cell of a number; empty for None, and for what is not finite a dash."""
    if value is None:
        return Cell("")
    if not math.isfinite(value):
        return Cell("not finite", math.inf)
    return Cell(
        shown.format(value), value, None if heat is None or not math.isfinite(heat) else min(1.0, max(0.0, heat))
    )


def layers(report: AwqReport) -> Sheet:
    """List the quantized layers."""
    rows = [row for row in report.layers if row.status != "float"]
    titles = ("loss / RTN's", "loss", "alpha", "bits a weight", "group", "in", "out", "tokens")
    words = ("scale", "applied", "clip", "method", "note")
    columns = [Column("layer", False), Column("kind", False)]
    columns += [*map(Column, titles), *(Column(title, False) for title in words)]
    span = _span([row.loss for row in rows])
    return Sheet("layers", columns, [_layer(row, span) for row in rows])


def _layer(row: LayerReport, span: tuple[float, float]) -> list[Cell]:
    ratio = row.loss / row.loss_rtn if row.loss is not None and row.loss_rtn else None
    low, high = span
    warm = (math.log(row.loss) - low) / (high - low) if row.loss and math.isfinite(row.loss) and high > low else None
    kind = kind_of(row.name)
    group = Cell("row", math.inf) if row.group_size == -1 else number(row.group_size, "{}")
    return [
        Cell(row.name),
        Cell(kind, kind=kind),
        number(ratio, "{:.3f}", ratio),
        number(row.loss, heat=warm),
        number(row.alpha, "{:.2f}"),
        number(stored_bits([row]), "{:.2f}"),
        group,
        number(row.in_features, "{}"),
        number(row.out_features, "{}"),
        number(row.tokens, "{:,}"),
        Cell(row.scale),
        Cell(row.applied),
        Cell("yes" if row.clipped else ""),
        Cell(row.method),
        Cell(row.note),
    ]


def _span(values: Sequence[float | None]) -> tuple[float, float]:
    """Find the logarithms of the smallest and the largest of positive values."""
    found = [math.log(value) for value in values if value and math.isfinite(value)]
    return (min(found), max(found)) if found else (0.0, 0.0)


def blocks(report: AwqReport) -> Sheet | None:
    """List the blocks; None without any."""
    columns = [
        Column("block", False),
        Column("output moved by"),
        Column("float output moved by folds"),
        Column("note", False),
    ]
    most = max((block.output_error or 0.0 for block in report.blocks), default=0.0)
    rows = [
        [
            Cell(block.name or "(whole model)"),
            number(block.output_error, "{:.2e}", (block.output_error or 0.0) / most if most else None),
            number(block.fold_error, "{:.1e}"),
            Cell(block.note),
        ]
        for block in report.blocks
    ]
    return Sheet("blocks", columns, rows) if rows else None


def evaluations(report: AwqReport) -> Sheet | None:
    """List what the model scored on evaluation texts, with 95 % intervals; None where it was not evaluated."""
    found = {text: measures_of(one) for text, one in report.evaluations.items()}
    names = list(dict.fromkeys(name for one in found.values() for name in one))
    names.sort(key=lambda name: list(_MEASURES).index(name) if name in _MEASURES else len(_MEASURES))
    columns = [Column("evaluation text", False)]
    for name in names:
        columns += [Column(_MEASURES.get(name, name)), Column("95 % interval")]
    rows = []
    for text, one in found.items():
        cells = [Cell(text)]
        for name in names:
            cells += _estimate(name, one.get(name))
        rows.append([*cells, number(report.evaluations[text].get("tokens"), "{:,}")])
    return Sheet("evaluations", [*columns, Column("tokens scored")], rows) if rows else None


def _estimate(name: str, estimate: Mapping[str, Any] | None) -> list[Cell]:
    if estimate is None:
        return [Cell(""), Cell("")]
    shown = "{:.1%}" if name == "top1" else "{:.4g}"
    value, low, high = (estimate.get(part) for part in ("value", "low", "high"))
    heat = value / LARGE if name == "kl" and value is not None else None
    known = low is not None and high is not None
    interval = Cell(f"{shown.format(low)} to {shown.format(high)}", low) if known else Cell("")
    return [Cell("not finite", math.inf) if value is None else number(value, shown, heat), interval]


def folds(report: AwqReport) -> Sheet | None:
    """Count where the scales went, by kind of layer; None where there are none."""
    rows = [row for row in report.layers if row.status != "float"]
    if not any(row.applied for row in rows):
        return None
    found = {kind: Counter(row.applied for _, row in pairs) for kind, pairs in by_kind(rows).items()}
    places = [place for place in _PLACES if any(counts[place] for counts in found.values())]
    columns = [Column("kind", False), *(Column(_PLACES[place]) for place in places)]
    lines = []
    for kind, counts in found.items():
        total = counts.total()
        cells = [number(counts[place] or None, "{:,}", counts[place] / total) for place in places]
        lines.append([Cell(kind, kind=kind), *cells])
    return Sheet("folds", columns, lines)
