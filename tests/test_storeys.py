"""Imports run downwards only, folders stay small, and the check itself finds what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
from storeys import LIST, PACKAGE, ROOT, STOREYS, drawn, listed, violations


def test_imports_run_downwards() -> None:
    assert violations(PACKAGE) == []


def test_every_folder_has_a_storey_and_is_small() -> None:
    folders = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    assert folders == {name for names in STOREYS for name in names} - {"modules"}
    for folder in (PACKAGE, *(PACKAGE / name for name in sorted(folders))):
        files = [
            f
            for f in folder.iterdir()
            if f.suffix in (".py", ".pyi", ".typed") and f.name not in ("_build.py", "__init__.py")
        ]
        assert len(files) <= (8 if folder == PACKAGE else 12), folder


@pytest.mark.parametrize(
    "file, line, complaint",
    [
        ("survey/groups.py", "from ..solving.codes import Codes", "solving is not below survey"),
        ("kernels/tiles.py", "def late():\n    from ..undo import interrupt", "undo is not below kernels"),
        ("folding/fold.py", "import awq_ext.calibration.statistics", "calibration is not below folding"),
        ("checkpoints/write.py", "import transformers", "only integrations, checkpoints.conversions may"),
        ("drawer/things.py", "from ..config import AwqConfig", "drawer has no storey"),
    ],
)
def test_an_import_that_runs_upwards_is_found(file: str, line: str, complaint: str, tmp_path: Path) -> None:
    made = tmp_path / "awq_ext" / file
    made.parent.mkdir(parents=True)
    made.write_text(line + "\n")
    (found,) = violations(tmp_path / "awq_ext")
    assert complaint in found


def test_what_is_drawn_from_the_storeys_is_up_to_date() -> None:
    """``python tests/storeys.py`` writes both."""
    shown = LIST.search((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert shown and shown.group() == listed()
    assert (ROOT / "docs" / "storeys.svg").read_text(encoding="utf-8") == drawn()
