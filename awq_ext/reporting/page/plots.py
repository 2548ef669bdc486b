"""Draw the plots of the page; each function returns SVG text, or None where there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..report import TAIL_PLACES, AwqReport, LayerReport
from .drawing import ACCENT, LINE, MOST_NAMED, QUIET, Plot, drawn, percent, plain_numbers, whole_numbers
from .layer_kinds import KINDS, by_kind, place_name


def largest(rows: Sequence[LayerReport], value: Callable[[LayerReport], float]) -> list[LayerReport]:
    """Choose the layers that a plot names: those of the largest values, the first of equal ones."""
    return sorted((row for row in rows if math.isfinite(value(row))), key=lambda row: -value(row))[:MOST_NAMED]


def highest(values: Sequence[float]) -> float:
    """Find the largest of values that an axis can reach to; 1 without any above zero."""
    return max((value for value in values if value is not None and 0 < value < math.inf), default=1.0)


def losses(report: AwqReport) -> str | None:
    """Plot each layer's loss as a share of RTN's; the worst are named."""
    rows = [row for row in report.layers if row.loss is not None and row.loss_rtn]
    ratio = lambda row: row.loss / row.loss_rtn  # noqa: E731

    def draw(plot: Plot) -> None:
        plot.axis.axhline(1, color=QUIET, lw=1, zorder=0)
        plot.axis.annotate(
            "RTN", (1, 1), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right"
        )
        plot.axis.set(ylabel="loss / RTN's loss", ylim=(0, max(1.12, 1.05 * highest(list(map(ratio, rows))))))
        # at RTN's own loss they are many and alike
        plot.points(rows, ratio, named=largest([row for row in rows if ratio(row) < 1], ratio))

    return drawn("losses", "loss of each layer, as a share of plain rounding's", draw) if rows else None


def absolute_losses(report: AwqReport) -> str | None:
    """Plot both losses of each layer on a logarithmic scale; the largest are named."""
    rows = [row for row in report.layers if row.loss and row.loss_rtn]

    def draw(plot: Plot) -> None:
        for pairs in by_kind(rows).values():
            for place, row in pairs:
                plot.axis.plot([place] * 2, [row.loss_rtn, row.loss], color=QUIET, lw=0.8, zorder=1)
            x, y = [place for place, _ in pairs], [row.loss_rtn for _, row in pairs]
            plot.axis.plot(x, y, "_", ms=5, mew=0.8, color=QUIET, zorder=1)
        plot.axis.set(ylabel="mean squared output error", yscale="log")
        plot.points(rows, lambda row: row.loss, named=largest(rows, lambda row: row.loss))
        plain_numbers(plot.axis)

    return drawn("absolute", "output error of each layer", draw) if rows else None


def block_errors(report: AwqReport) -> str | None:
    """Plot how far the output of each block moved; the worst is named."""
    errors = [block.output_error for block in report.blocks]
    known = [(x, error) for x, error in enumerate(errors) if error is not None]

    def draw(plot: Plot) -> None:
        plot.axis.bar(*zip(*known, strict=True), color=ACCENT, width=0.75)
        x, error = max(known, key=lambda pair: pair[1])
        # the outer ones would reach over the edge
        beside = "left" if 8 * x < len(errors) else "right" if 8 * x > 7 * len(errors) else "center"
        plot.axis.annotate(f"{x}: {error:.2g}", (x, error), (0, 2), textcoords="offset points", ha=beside)
        plot.axis.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        plot.axis.set(xlabel="block", ylabel="relative output error", ylim=(0, 1.1 * highest([error])))
        whole_numbers(plot.axis)

    return drawn("blocks", "relative output error of each block", draw, legend=False) if known else None


def alphas(report: AwqReport) -> str | None:
    """Plot the exponent that was chosen for each scale group; the identity lies at zero."""
    rows = [row for row in report.layers if row.status != "float" and row.group in ("", row.name) and row.scale]

    def draw(plot: Plot) -> None:
        plot.points(rows, lambda row: row.alpha or 0.0, "{:.2f}")
        plot.axis.set(ylabel="alpha (identity: 0)", ylim=(-0.04, 1.04))

    return drawn("alphas", "alpha of each scale group", draw) if any(row.alpha is not None for row in rows) else None


def tails(report: AwqReport) -> str | None:
    """Plot the salience of the channels, ranked: all lightly, those whose top 1 % hold most boldly and by name."""
    rows = [row for row in report.layers if row.tail and row.tail[0] > 0]  # silent inputs have none to show
    bold = {row.name for row in largest(rows, lambda row: row.top_share or 0.0)} if len(rows) > MOST_NAMED else set()

    def draw(plot: Plot) -> None:
        for kind, pairs in by_kind(rows).items():
            for position, (_, row) in enumerate(pairs):
                # the channels lie evenly on the axis; a logarithm needs the first one to lie right of zero
                places = [max(place, 0.5 / row.in_features) for place in TAIL_PLACES]
                look = {"lw": 1.8, "alpha": 1, "zorder": 3} if row.name in bold else {"lw": 0.7, "alpha": 0.3}
                look |= {"color": KINDS[kind].light, "label": kind if position == 0 else None}
                plot.axis.plot(places, row.tail, **look)
        plot.axis.set(xscale="log", yscale="log", ylim=(1e-2, 4 * highest([row.tail[0] for row in rows])))
        plot.axis.set(xlabel="channels, most salient first", ylabel="salience / its mean")
        plot.axis.axhline(1, color=LINE, lw=0.8, ls=":")
        plot.axis.axvline(0.01, color=LINE, lw=0.8, ls=":")
        plot.axis.xaxis.set_major_formatter(percent)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "bottom"}
        plot.axis.annotate("top 1 %", (0.01, 0), (3, 2), **place)
        plot.axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for kind, pairs in by_kind(rows).items():
            for _, row in pairs:
                if row.name in bold:
                    plot.label(
                        max(TAIL_PLACES[2], 0.5 / row.in_features), row.tail[2], place_name(row), KINDS[kind].light
                    )

    return drawn("tails", "salience of the channels, ranked", draw) if rows else None


def top_shares(report: AwqReport) -> str | None:
    """Plot which part of the salience 1 % of the channels hold, by scale group; the largest are named."""
    rows = [row for row in report.layers if row.top_share is not None]

    def draw(plot: Plot) -> None:
        share = lambda row: row.top_share  # noqa: E731
        plot.axis.set(ylabel="held by the top 1 %", ylim=(0, 1.06 * highest(list(map(share, rows)))))
        plot.points(rows, share, "{:.1%}", named=largest(rows, share))
        plot.axis.axhline(0.01, color=LINE, lw=0.8, ls=":")
        plot.axis.yaxis.set_major_formatter(percent)

    return drawn("shares", "share of the salience that 1 % of the channels hold", draw) if rows else None


def tokens(report: AwqReport) -> str | None:
    """Plot how many calibration rows each input saw, the fewest by name; None where all saw the same number."""
    firsts = {row.name: row.tokens for row in report.layers}
    # experts that share a scale have rows of their own
    own = lambda row: row.group in ("", row.name) or row.tokens != firsts.get(row.group)  # noqa: E731
    rows = [row for row in report.layers if row.status != "float" and own(row)]
    if len({row.tokens for row in rows}) < 2:
        return None

    def draw(plot: Plot) -> None:
        plot.axis.set(ylabel="tokens seen", ylim=(0, 1.05 * highest([row.tokens for row in rows])))
        plot.points(rows, lambda row: row.tokens, "{:,}", named=largest(rows, lambda row: -row.tokens))

    return drawn("tokens", "calibration tokens that each layer saw", draw)
