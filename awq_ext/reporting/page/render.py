"""Render a report as one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from ..report import AwqReport
from . import columns, header
from .layer_kinds import KINDS

_HERE = Path(__file__).parent
# Function of plots.py -> title, and what the plot says.
PLOTS = {
    "losses": (
        "Losses beside plain rounding",
        "Squared error of each layer's output on the calibration text, divided by that of rounding to nearest (RTN). 0 is the "
        "float model. Labelled: the layers that gain least over RTN.",
    ),
    "absolute_losses": (
        "Losses",
        "The same errors, undivided. A grey line ends at RTN's error. Do not judge models by their sum: compare() measures "
        "them.",
    ),
    "block_errors": (
        "Blocks",
        "Relative error of each block's output, on the first calibration batch and on the inputs that it was calibrated with.",
    ),
    "alphas": (
        "Alpha",
        "Exponent of the scale that the search chose for each input. 0: no scaling was best.",
    ),
    "tails": (
        "Heavy tails",
        "Salience (mean activation times mean weight) of the channels of each input, ranked. Bold: the three inputs whose top 1 % "
        "hold most.",
    ),
    "top_shares": (
        "What one channel in a hundred holds",
        "The more of the salience, the more there is for scales to protect. Dotted: if all channels were alike.",
    ),
    "tokens": (
        "Tokens",
        "Calibration tokens that each input saw. Few of them (experts that are rarely chosen) make unsteady statistics.",
    ),
}


def render(report: AwqReport) -> str:
    """Render the HTML. ImportError names the extra where jinja2 or matplotlib is missing."""
    try:
        import jinja2

        plots = _plots(report)
    except ImportError as error:
        raise ImportError("an HTML report needs jinja2 and matplotlib: pip install 'awq-ext[report]'") from error
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    script = _read("page.js")
    return environment.from_string(_read("page.html.jinja")).render(
        report=report,
        style=_palette("light") + _read("page.css") + f"@media (prefers-color-scheme: dark) {{ {_palette('dark')} }}\n",
        script=script,
        # nothing may be loaded, and no other script may run
        allowed=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        verdict=header.verdict(report),
        facts=header.facts(report),
        tiles=header.tiles(report),
        warnings=header.warnings(report),
        reasons=header.reasons(report),
        weighted=header.importance_weighted(report),
        between=header.between_texts(report),
        evaluations=columns.evaluations(report),
        folds=columns.folds(report),
        layers=columns.layers(report),
        blocks=columns.blocks(report),
        times=_times(report),
        plots=plots,
        settings={name: value for name, value in report.config.items() if value not in ({}, [], ())},
    )


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _palette(ground: str) -> str:
    """Write the colours of the kinds as variables of the page's style."""
    colors = "".join(f" --kind-{kind}: {getattr(style, ground)};" for kind, style in KINDS.items())
    return f":root {{{colors} }}\n"


def _plots(report: AwqReport) -> list[tuple[str, str, str]]:
    """Draw the plots that have anything to show: (title, SVG, what it says)."""
    from . import plots

    drawn = [(title, getattr(plots, name)(report), text) for name, (title, text) in PLOTS.items()]
    return [(title, svg, text) for title, svg, text in drawn if svg is not None]


def _times(report: AwqReport) -> list[tuple[str, float, float]]:
    """Split the time: (what, seconds, share of all in [0, 1])."""
    known = [
        ("calibration", report.calibration_seconds),
        ("search and rounding", report.search_seconds),
        *([("tuning of scales", report.tuning_seconds)] if report.tuning_seconds else []),
    ]
    parts = [*known, ("rest", max(0.0, report.seconds - sum(seconds for _, seconds in known)))]
    total = sum(seconds for _, seconds in parts)
    return [(what, seconds, seconds / total) for what, seconds in parts] if total else []
