"""The tables of settings and public names are those of the classes and docstrings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import reference

from awq_ext.config import AwqConfig


def test_the_tables_are_up_to_date() -> None:
    """``python tests/reference.py`` writes them."""
    assert reference.page() == reference.PAGE.read_text(encoding="utf-8")


def test_a_changed_table_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / "reference.md"
    stale.write_text(reference.PAGE.read_text(encoding="utf-8").replace("| `damping` | float | `1.0` |", ""), "utf-8")
    monkeypatch.setattr(reference, "PAGE", stale)
    assert reference.page() != stale.read_text("utf-8")


def test_every_field_has_a_row_with_one_sentence() -> None:
    rows = [line.split(" | ") for line in reference.settings().splitlines() if line.startswith("| `")]
    listed = [row[0].strip("| `") for row in rows if len(row) == 4]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(AwqConfig))
    for row in rows:
        if len(row) == 4:
            assert 10 < len(row[3]) < 140 and row[3].endswith(". |"), row


def test_a_field_that_the_docstring_leaves_out_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "explained", lambda: iter([("What is quantized", "bits", "bits.")]))
    with pytest.raises(SystemExit, match="does not explain method, group_size"):
        reference.settings()
