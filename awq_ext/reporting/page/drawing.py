"""Draw with matplotlib, and turn the result to SVG whose colours the page's style decides."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from io import StringIO
from typing import Any

from ..report import LayerReport
from .layer_kinds import KINDS, by_kind, in_blocks, place_name

# what is drawn in these colours takes those of the page: light or dark
TEXT, LINE, QUIET, PAPER, ACCENT = "#33414e", "#52606d", "#b8c4cc", "#fefefe", "#0b5cad"
VARIABLES = {TEXT: "ink", LINE: "soft", QUIET: "quiet", PAPER: "paper", ACCENT: "accent"}
VARIABLES |= {style.light: f"kind-{kind}" for kind, style in KINDS.items()}
MOST_NAMED = 3  # labels in a plot
_INCHES = 4.5  # width of a plot: shown as wide as on a phone, letters are as large as in the text around
_ROOM, _RISE = 0.075, 0.06  # of the height of the axes: between two labels, and from a point up to its own
_STYLE = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "text.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": TEXT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.fonttype": "none",  # text stays text: small files, and readers can search it
    "svg.hashsalt": "awq_ext",
}


class Plot:
    """One pair of axes, and what is said of its points when a pointer rests on them."""

    def __init__(self, axis: Any) -> None:
        self.axis = axis
        self.titles: dict[str, list[str]] = {}
        self._labels: list[tuple[float, float, str, str]] = []

    def points(
        self,
        rows: Sequence[LayerReport],
        value: Callable[[LayerReport], float],
        shown: str = "{:.3g}",
        named: Sequence[LayerReport] = (),
    ) -> None:
        """Draw one point for each layer, by block, in the colour and marker of its kind; those ``named`` get a label."""
        wanted = {row.name for row in named}
        for kind, pairs in by_kind(rows).items():
            style = KINDS[kind]
            x, y = [x for x, _ in pairs], [value(row) for _, row in pairs]
            (line,) = self.axis.plot(x, y, style.marker, ms=5, mew=0, color=style.light, alpha=0.85, label=kind)
            self.tell(line, [f"{row.name}: {shown.format(value(row))}" for _, row in pairs])
            for place, row in pairs:
                if row.name in wanted:
                    self.label(place, value(row), place_name(row), style.light)
        self.axis.set_xlabel(x_label(rows))
        whole_numbers(self.axis)

    def tell(self, artist: Any, titles: list[str]) -> None:
        """Say of each point of ``artist`` what it is."""
        name = f"points{len(self.titles)}"
        artist.set_gid(name)
        self.titles[name] = titles

    def label(self, x: float, y: float, text: str, color: str = TEXT) -> None:
        """Write a name beside a point; where is decided when all of them are known."""
        self._labels.append((x, y, text, color))

    def place_labels(self) -> None:
        """Write the labels one above the other where they would meet, each with a line to its point."""
        self.axis.get_xlim(), self.axis.get_ylim()  # which the limits are then made for: they are not before
        found, last = [], -1.0
        for x, y, text, color in self._labels:
            right, up = self.axis.transLimits.transform(self.axis.transScale.transform((x, y)))
            found.append((up, right, x, y, text, color))
        found.sort()
        heights = []
        for up, *_ in found:
            last = max(up + _RISE, last + _ROOM)
            heights.append(last)
        over = max(0.0, (heights[-1] if heights else 0.0) - 0.97)
        for index, ((_, right, x, y, text, color), height) in enumerate(zip(found, heights, strict=True)):
            left = right > 0.55
            note = self.axis.annotate(
                text,
                (x, y),
                (right + (-0.1 if left else 0.1), height - over),
                textcoords="axes fraction",
                fontsize=9.5,
                color=TEXT,
                ha="right" if left else "left",
                va="center",
                arrowprops={"arrowstyle": "-", "lw": 0.8, "color": LINE, "shrinkA": 1, "shrinkB": 0},
                zorder=5,
            )
            note.set_gid(f"label{index}")
            self.axis.plot([x], [y], "o", ms=9, mfc="none", mec=color, mew=1.2, zorder=4)


def drawn(name: str, title: str, draw: Callable[[Plot], None], legend: bool = True, height: float = 3.2) -> str:
    """Draw one plot as an SVG element, narrow enough for a phone. Ids carry ``name``, so that one file holds several plots."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_INCHES, height), layout="constrained")
        plot = Plot(figure.add_subplot())
        draw(plot)
        plot.place_labels()
        if legend:
            _add_legend(figure, plot.axis)
        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_the_page(_told(file.getvalue(), plot.titles), name, title)


def _add_legend(figure: Any, axis: Any) -> None:
    """Put what the colours are above the axes, row by row."""
    handles, labels = axis.get_legend_handles_labels()
    if not handles:
        return
    # inches: a marker and what is around it, and so much a letter
    columns = max(1, min(len(handles), int(_INCHES / (0.36 + 0.07 * max(map(len, labels))))))
    # matplotlib fills column by column: as many places in each but the last ones
    rows = -(-len(handles) // columns)
    columns = -(-len(handles) // rows)
    order = [i for column in range(columns) for i in range(column, len(handles), columns)]
    made = figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside upper center",
        ncols=columns,
        columnspacing=0.9,
        handletextpad=0.3,
        handlelength=1.2,
    )
    for handle in made.legend_handles:
        handle.set_alpha(1)  # whatever is drawn light


def _told(svg: str, titles: dict[str, list[str]]) -> str:
    """Put the titles into the points of their groups."""
    for name, texts in titles.items():
        start = svg.index(f'<g id="{name}">')
        # as many as there are texts: markers lie one after the other, and nothing else in such a group is <use>
        parts = re.split(r"(<use [^>]*?)/>", svg[start:], maxsplit=len(texts))
        told = [
            part if index % 2 == 0 else f"{part}><title>{escape(texts[index // 2])}</title></use>"
            for index, part in enumerate(parts)
        ]
        svg = svg[:start] + "".join(told)
    return svg


def _for_the_page(text: str, name: str, title: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # ids are told apart, the size is left to the page, and so are the colours
    for pattern, prefix in ((r'\bid="', 'id="'), (r"url\(#", "url(#"), (r'xlink:href="#', 'xlink:href="#')):
        text = re.sub(pattern, f"{prefix}{name}-", text)
    for color, variable in VARIABLES.items():
        text = re.sub(color, f"var(--{variable})", text, flags=re.IGNORECASE)
    text = re.sub(r">\s+<", "><", text)
    size = r'(<svg[^>]*?) (?:width|height)="[^"]*"([^>]*?) (?:width|height)="[^"]*"'
    return re.sub(size, rf'\1\2 role="img" aria-label="{escape(title)}"', text, count=1)


def x_label(rows: Sequence[LayerReport]) -> str:
    """Label the x axis of layers."""
    return "block" if in_blocks(rows) else "layer, in calling order"


def whole_numbers(axis: Any) -> None:
    """Put ticks at integers only."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with 0.6 and 1000 instead of powers of ten, and between them only where there is room."""
    from matplotlib.ticker import LogFormatter

    class Between(LogFormatter):
        def __call__(self, value: float, position: int | None = None) -> str:
            return f"{value:g}" if super().__call__(value, position) else ""

    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(Between(minor_thresholds=(1, 0.4)))


def percent(value: float, _: Any = None) -> str:
    """Format 0.01 as 1 %."""
    return f"{100 * value:g} %"
