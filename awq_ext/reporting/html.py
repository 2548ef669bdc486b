"""The HTML page of a report: one file, nothing loaded from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import AwqReport, LayerReport
from .tables import format_bytes

_MOST_NAMES = 4  # in a warning or a reason; more of them are folded away
TEMPLATE = Path(__file__).with_name("page.html.jinja")
# Function of figures.py -> title, and what the plot says.
PLOTS = {
    "losses": (
        "Losses beside plain rounding",
        "Squared error of each layer's output on the calibration text. 1 is rounding to nearest, 0 the float model.",
    ),
    "absolute_losses": (
        "Losses",
        "The same without dividing. Layers that lie high hold most of the error. The sum of the losses does not order models by "
        "perplexity: compare() does.",
    ),
    "block_errors": (
        "Blocks",
        "How far rounding moved the output of each block, on the first calibration batch and on the inputs it was calibrated with.",
    ),
    "alphas": (
        "Alpha",
        "Exponent of the scale that the search chose for each input. 0: no scale was better than plain rounding.",
    ),
    "tails": (
        "Heavy tails",
        "Salience (mean activation times mean weight) of the channels of each input, ranked. Left of the line: 1 % of them.",
    ),
    "top_shares": ("What one channel in a hundred holds", "The more, the more there is for scales to protect."),
    "folds": (
        "Where the scales went",
        "Into a norm or an earlier Linear they cost nothing when the model runs; at run time, one multiplication for each input "
        "value.",
    ),
    "tokens": (
        "Tokens",
        "Calibration rows that each input saw. Few of them (experts that are rarely chosen) make uncertain statistics.",
    ),
    "costs": ("Time", "Calibration grows with the number of samples, the search does not."),
}


def render(report: AwqReport) -> str:
    """The page. ImportError names the extra where jinja2 or matplotlib is missing."""
    try:
        import jinja2

        from . import plots as figures

        plots = _plots(report, figures)
    except ImportError as error:
        raise ImportError("an HTML report needs jinja2 and matplotlib: pip install 'awq-ext[report]'") from error
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report, tiles=_tiles(report), plots=plots, layers=_layers(report), most=_MOST_NAMES, **_lists(report)
    )


def _plots(report: AwqReport, figures: Any) -> list[tuple[str, str, str]]:
    """(title, SVG, what it says), those that have anything to show."""
    drawn = [(title, getattr(figures, name)(report), text) for name, (title, text) in PLOTS.items()]
    return [(title, svg, text) for title, svg, text in drawn if svg is not None]


def _tiles(report: AwqReport) -> list[tuple[str, str]]:
    """Figures of the summary: (what, how much)."""
    done = [row for row in report.layers if row.status != "float"]
    bits = sum(row.bits * row.in_features * row.out_features for row in done) / max(report.quantized_parameters, 1)
    loss, rtn = (sum(getattr(row, name) or 0.0 for row in done) for name in ("loss", "loss_rtn"))
    seen = [row.tokens for row in done] or [0]
    tokens = f"{min(seen):,}" if min(seen) == max(seen) else f"{min(seen):,} to {max(seen):,}"
    return [
        ("Linears quantized", f"{len(done)} of {len(report.layers)}"),
        ("of all parameters", f"{report.share_quantized:.1%}"),
        ("bits a weight", f"{bits:.3g}"),
        ("loss / RTN's, summed", f"{loss / rtn:.3f}" if rtn else "not measured"),
        ("tokens seen", tokens),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", format_bytes(report.peak_memory_bytes)),
        ("planned memory", format_bytes(report.planned_memory_bytes)),
    ]


def _layers(report: AwqReport) -> list[list[str]]:
    """Rows of the table of quantized layers."""
    return [_cells(row) for row in report.layers if row.status != "float"]


def _cells(row: LayerReport) -> list[str]:
    ratio = f"{row.loss / row.loss_rtn:.3f}" if row.loss is not None and row.loss_rtn else ""
    loss = "" if row.loss is None else f"{row.loss:.3g}"
    return [
        row.name,
        f"{row.in_features} → {row.out_features}",
        f"{row.bits}, {row.group_size}",
        row.method,
        f"{row.scale} {row.alpha:.2f}" if row.alpha is not None else row.scale,
        row.applied,
        "yes" if row.clipped else "",
        loss,
        ratio,
        f"{row.tokens:,}",
        row.note,
    ]


def _lists(report: AwqReport) -> dict[str, Any]:
    """Everything that is a plain list: layers that stayed float by reason, blocks with a note, settings."""
    reasons: dict[str, list[str]] = {}
    for row in report.layers:
        if row.status == "float":
            reasons.setdefault(row.note, []).append(row.name)
    settings = {name: value for name, value in report.config.items() if value not in ({}, [], ())}
    return {"reasons": reasons, "settings": settings, "warnings": list(map(_folded, report.warnings))}


def _folded(warning: str) -> tuple[str, str]:
    """(text, "") or, for one that begins with many names, (what is wrong with how many, their names)."""
    names, colon, text = warning.rpartition(": ")
    count = len(names.split(", "))
    return (f"{count} layers: {text}", names) if colon and count > _MOST_NAMES else (warning, "")
