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
