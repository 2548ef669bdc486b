"""The plots of the HTML report, as SVG text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any

from .layer_kinds import by_kind, short_names
from .report import TAIL_PLACES, AwqReport, LayerReport

# Colour-blind safe (Okabe and Ito 2008), without the yellow, which is hard to see on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6B4C9A", "#555555")
MARKERS = "osD^vPX*"
# (colour, marker, line) of the kinds of layers: when the colours are used up they come again with others of the rest
STYLES = tuple(
    (color, MARKERS[(i + turn) % len(MARKERS)], line)
    for turn, line in enumerate(("-", "--"))
    for i, color in enumerate(COLOURS)
)
QUIET, LINE = "#b8c4cc", "#33414e"
_INCHES = 4.7  # width of a plot
_STYLE = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8795a1",
    "axes.labelcolor": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.fonttype": "none",  # text stays text: small files, and readers can search it
    "svg.hashsalt": "awq_ext",
}


def losses(report: AwqReport) -> str | None:
    """Each layer's loss as a share of RTN's."""
    rows = [row for row in report.layers if row.loss is not None and row.loss_rtn]

    def draw(axis: Any) -> None:
        axis.axhline(1, color=QUIET, lw=1.5, label="RTN")
        axis.axhline(0, color=LINE, lw=1, label="float")
        scatter(axis, rows, lambda row: row.loss / row.loss_rtn)
        axis.set(xlabel=x_label(rows), ylabel="loss / RTN's loss", ylim=(-0.04, 1.09))

    return drawn("losses", draw) if rows else None


def absolute_losses(report: AwqReport) -> str | None:
    """Both losses of each layer, on a logarithmic scale."""
    rows = [row for row in report.layers if row.loss and row.loss_rtn]

    def draw(axis: Any) -> None:
        places = {row.name: x for pairs in by_kind(rows).values() for x, row in pairs}
        for row in rows:
            axis.plot([places[row.name]] * 2, [row.loss_rtn, row.loss], color=QUIET, lw=0.6, zorder=1)
        x = [places[row.name] for row in rows]
        axis.plot(x, [row.loss_rtn for row in rows], "_", ms=7, color=COLOURS[1], label="RTN")
        axis.plot(
            x, [row.loss for row in rows], ".", ms=6, color=COLOURS[0], label=str(report.config.get("method", ""))
        )
        axis.set(xlabel=x_label(rows), ylabel="mean squared output error", yscale="log")
        plain_numbers(axis)
        whole_numbers(axis)

    return drawn("absolute", draw) if rows else None


def block_errors(report: AwqReport) -> str | None:
    """How far the output of each block moved."""
    errors = [block.output_error for block in report.blocks]
    known = [(x, error) for x, error in enumerate(errors) if error is not None]

    def draw(axis: Any) -> None:
        axis.bar(*zip(*known, strict=True), color=COLOURS[0], width=0.75)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axis.set(xlabel="block", ylabel="relative output error", ylim=(0, None))
        whole_numbers(axis)

    return drawn("blocks", draw, legend=False) if known else None


def alphas(report: AwqReport) -> str | None:
    """The exponent that was chosen for each scale group; the identity lies at zero."""
    rows = [row for row in report.layers if row.status != "float" and row.group in ("", row.name) and row.scale]

    def draw(axis: Any) -> None:
        scatter(axis, rows, lambda row: row.alpha or 0.0)
        axis.set(xlabel=x_label(rows), ylabel="alpha (identity: 0)", ylim=(-0.04, 1.04))

    return drawn("alphas", draw) if any(row.alpha is not None for row in rows) else None


def tails(report: AwqReport) -> str | None:
    """Salience of the channels, ranked: how much more the loudest hold than the mean."""
    rows = [row for row in report.layers if row.tail]

    def draw(axis: Any) -> None:
        kinds = by_kind(rows)
        short = short_names(list(kinds))
        for (color, _, line), (kind, pairs) in zip(STYLES, kinds.items(), strict=False):
            for position, (_, row) in enumerate(pairs):
                # the channels lie evenly on the axis; a logarithm needs the first one to lie right of zero
                places = [max(place, 0.5 / row.in_features) for place in TAIL_PLACES]
                label = short[kind] if position == 0 else None
                axis.plot(places, row.tail, color=color, lw=0.8, ls=line, alpha=0.55, label=label)
        axis.axhline(1, color=LINE, lw=0.8, ls=":")
        axis.axvline(0.01, color=LINE, lw=0.8, ls=":")
        axis.set(xscale="log", yscale="log", ylim=(1e-2, None))
        axis.set(xlabel="channels, most salient first", ylabel="salience / its mean")
        axis.xaxis.set_major_formatter(percent)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
        axis.annotate("top 1 %", (0.01, 1), (2, 2), fontsize=9.5, **place)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")

    return drawn("tails", draw) if rows else None


def percent(value: float, _: Any = None) -> str:
    """0.01 -> 1 %."""
    return f"{100 * value:g} %"


def top_shares(report: AwqReport) -> str | None:
    """Part of the salience that 1 % of the channels hold, by scale group."""
    rows = [row for row in report.layers if row.top_share is not None]

    def draw(axis: Any) -> None:
        scatter(axis, rows, lambda row: row.top_share)
        axis.axhline(0.01, color=LINE, lw=0.8, ls=":", label="if all were alike")
        axis.yaxis.set_major_formatter(percent)
        axis.set(xlabel=x_label(rows), ylabel="held by the top 1 %", ylim=(0, None))

    return drawn("shares", draw) if rows else None


def folds(report: AwqReport) -> str | None:
    """Where the scales went, by the part that a layer plays."""
    rows = [row for row in report.layers if row.status != "float"]
    kinds = by_kind(rows)
    places = {"norm": COLOURS[2], "linear": COLOURS[0], "weights": COLOURS[4], "run time": COLOURS[1], "": QUIET}
    words = {"": "no scale", "linear": "an earlier Linear", "norm": "a norm", "weights": "its own weights"}

    def draw(axis: Any) -> None:
        names = list(kinds)[::-1]
        short = short_names(names)
        left = [0] * len(names)
        for place, color in places.items():
            counts = [Counter(row.applied for _, row in kinds[name])[place] for name in names]
            if any(counts):
                axis.barh(
                    [short[name] for name in names],
                    counts,
                    left=left,
                    color=color,
                    label=words.get(place, place),
                    height=0.7,
                )
                left = [a + b for a, b in zip(left, counts, strict=True)]
        axis.set(xlabel="layers")
        whole_numbers(axis)

    return drawn("folds", draw) if rows else None


def tokens(report: AwqReport) -> str | None:
    """Calibration rows that each input saw; nothing where all saw the same, which takes no plot to say."""
    firsts = {row.name: row.tokens for row in report.layers}
    # experts that share a scale have rows of their own
    own = lambda row: row.group in ("", row.name) or row.tokens != firsts.get(row.group)  # noqa: E731
    rows = [row for row in report.layers if row.status != "float" and own(row)]
    if len({row.tokens for row in rows}) < 2:
        return None

    def draw(axis: Any) -> None:
        scatter(axis, rows, lambda row: row.tokens)
        axis.set(xlabel=x_label(rows), ylabel="tokens seen", ylim=(0, None))

    return drawn("tokens", draw)


def costs(report: AwqReport) -> str:
    """Where the time went."""
    rest = max(0.0, report.seconds - report.calibration_seconds - report.search_seconds)
    parts = {"calibration": report.calibration_seconds, "search and rounding": report.search_seconds, "rest": rest}

    def draw(axis: Any) -> None:
        left = 0.0
        for (name, seconds), color in zip(parts.items(), (COLOURS[0], COLOURS[1], QUIET), strict=True):
            axis.barh([""], [seconds], left=left, color=color, label=f"{name} {seconds:.1f} s", height=0.5)
            left += seconds
        axis.set(xlabel="seconds", yticks=[])

    return drawn("costs", draw, height=1.7)


def scatter(axis: Any, rows: Sequence[LayerReport], value: Callable[[LayerReport], float]) -> None:
    """One point a layer, by block; layers of one kind share a colour."""
    kinds = by_kind(rows)
    short = short_names(list(kinds))
    for (color, marker, _), (kind, pairs) in zip(STYLES, kinds.items(), strict=False):
        x, y = zip(*((x, value(row)) for x, row in pairs), strict=True)
        axis.plot(x, y, marker, ms=4, color=color, label=short[kind] if kind != "layers" else None)
    whole_numbers(axis)


def x_label(rows: Sequence[LayerReport]) -> str:
    """What the x axis of scatter() counts."""
    return "layer, in calling order" if "layers" in by_kind(rows) else "block"


def whole_numbers(axis: Any) -> None:
    """Ticks at integers only."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def plain_numbers(axis: Any) -> None:
    """0.6 and 1000 on a logarithmic axis, in place of powers of ten; between them only where there is room."""
    from matplotlib.ticker import LogFormatter

    class Between(LogFormatter):
        def __call__(self, value: float, position: int | None = None) -> str:
            return f"{value:g}" if super().__call__(value, position) else ""

    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(Between(minor_thresholds=(1, 0.4)))


def drawn(name: str, draw: Callable[[Any], None], legend: bool = True, height: float = 3.1) -> str:
    """The SVG element of one plot, narrow: to be read on a phone too. Ids carry ``name``: several fit into one page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_INCHES, height), layout="constrained")
        axis = figure.add_subplot()
        draw(axis)
        handles, labels = axis.get_legend_handles_labels()
        if legend and handles:
            # inches: a marker and what is around it, and so much a letter
            columns = max(1, int(_INCHES / (0.45 + 0.072 * max(map(len, labels)))))
            figure.legend(
                loc="outside upper center", ncols=min(3, columns, len(handles)), columnspacing=1.0, handletextpad=0.4
            )
        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # ids are told apart, and the size is left to the page
    for pattern, prefix in ((r'\bid="', 'id="'), (r"url\(#", "url(#"), (r'xlink:href="#', 'xlink:href="#')):
        text = re.sub(pattern, f"{prefix}{name}-", text)
    return re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"([^>]*?) (?:width|height)="[^"]*"', r"\1\2", text, count=1)
