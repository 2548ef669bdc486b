"""Grid: one table in three forms."""

from __future__ import annotations

import pytest

from awq_ext.reporting.tables import Cell, Grid, as_text

GRID = Grid("a | b <c>", ["method", "loss"], [[Cell("rtn|x"), Cell("1.5")], [Cell("<awq>"), Cell("[bold]", best=True)]])


def test_markdown_and_html_escape_what_they_must() -> None:
    assert GRID.to_markdown().splitlines()[2:] == [
        "| method | loss |",
        "| :-- | --: |",
        "| rtn\\|x | 1.5 |",
        "| <awq> | **[bold]** |",
    ]
    html = GRID.to_html()
    assert "a | b &lt;c&gt;" in html and "<td>&lt;awq&gt;</td><td><b>[bold]</b></td>" in html


@pytest.mark.parametrize("jupyter", [False, True])
def test_text_is_returned_wherever_it_is_asked_for(jupyter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook rich displays what is printed, also to a file: the text would be shown twice and be empty."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: jupyter)
    lines = [line.split() for line in as_text(GRID.to_rich()).splitlines()]
    assert lines[0] == ["a", "|", "b", "<c>"] and ["<awq>", "[bold]"] in lines


def test_headings_wrap_between_words() -> None:
    """On a terminal of 80 columns, the table of costs of a comparison is too wide for its headings on one line."""
    header = ["method", "MB", "of float", "seconds", "tokens/s", "× float", "tokens/s, single", "× float"]
    cells = ["RTN 3 bit", "0.669*", "25%", "18.6", "16,275", "0.98", "1,185", "1.23"]
    text = as_text(Grid("Cost", header, [list(map(Cell, cells))]).to_rich(), width=80)
    assert "…" not in text and "tokens/s," in text and "single" in text
    assert " ".join(cells) in [" ".join(line.split()) for line in text.splitlines()]
