"""Tables for the terminal, Markdown and HTML, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as escape_html
from io import StringIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape as escape_rich
from rich.table import Table as RichTable
from rich.text import Text


@dataclass(frozen=True)
class Cell:
    """Text, and whether it stands out as the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A titled table; the first column is text, the others are figures."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def to_rich(self) -> Group:
        """Render for a terminal. The title is no part of rich's table, which would wrap it to its own width."""
        # two spaces between columns, not three: eight figures fit into 80 columns
        table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for position, name in enumerate(self.header):
            word = max(map(len, name.split()), default=0)  # a heading may wrap, but only between its words
            align = "right" if position else "left"
            table.add_column(escape_rich(name), justify=align, no_wrap=position == 0, min_width=word)
        for row in self.rows:
            table.add_row(*(Text(cell.text, style="bold green" if cell.best else "") for cell in row))
        return Group(Text(self.title, style="bold"), table)

    def to_markdown(self) -> str:
        """Render as a GitHub table under a bold title."""
        lines = [f"**{self.title}**", "", _markdown_row(self.header)]
        lines.append(_markdown_row([":--", *["--:"] * (len(self.header) - 1)]))
        lines += [_markdown_row([f"**{c.text}**" if c.best else c.text for c in row]) for row in self.rows]
        return "\n".join(lines)

    def to_html(self) -> str:
        """Render as a table element with its caption."""
        head = "".join(f"<th>{escape_html(name)}</th>" for name in self.header)
        body = "".join("<tr>" + "".join(_html_cell(cell) for cell in row) + "</tr>" for row in self.rows)
        caption = f'<caption style="text-align:left;font-weight:bold">{escape_html(self.title)}</caption>'
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _html_cell(cell: Cell) -> str:
    text = escape_html(cell.text)
    return f"<td><b>{text}</b></td>" if cell.best else f"<td>{text}</td>"


def as_text(*parts: RenderableType, width: int = 120) -> str:
    """Return what a terminal without colours would show."""
    # in a notebook rich would show it there and then, and leave the file empty
    console = Console(file=StringIO(), width=width, color_system=None, force_jupyter=False, force_terminal=False)
    console.print(Group(*parts))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pad cells to the width of their column; one line for each row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def counted(count: int, noun: str) -> str:
    """Format a count: ``1 thread``, ``1,024 threads``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shared_scales(group_size: int) -> str:
    """Say how many weights share a scale: ``groups of 64``."""
    return "one scale for each row" if group_size == -1 else f"groups of {group_size}"


def format_bytes(count: float) -> str:
    """Format a size: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
