"""docs/faults.md: what goes wrong and what happens then, from the tests that are marked ``fault``.

``@pytest.mark.fault(section, fault, what happens)``: the fault may name parameters of the test in braces.
``python tests/faults.py`` writes the page; with ``--check`` it only tells, by its exit status, whether that is up to date.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "faults.md"
HEAD = """# What happens when things go wrong

Damaged files, wrong arguments, full disks, interrupts: what was tried, and what happens then. Each row is a test of this
repository (in the folder tests), so it holds for every version that passed them: `pytest -m fault` runs them all.
`python tests/faults.py` writes this page.

Two things no library can mend. A child of `fork()` hangs in torch's *own* operations if its parent has used torch's threads: call
`torch.set_num_threads(1)` first in such a child, or start it with `spawn`. And a file that somebody changes *before* it is read,
without breaking its form, is read as it is: checkpoints hold no checksums.
"""
SECTIONS = (
    "Calls of quantize",
    "Interrupts",
    "Files of a checkpoint",
    "Files of awq_ext.save",
    "Reading beside others",
    "Writing a checkpoint",
    "Memory",
    "Processes and threads",
)
Row = tuple[str, str, str]


class _Collector:
    """Keeps the tests that pytest has found."""

    items: list[pytest.Item]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def rows() -> dict[str, list[Row]]:
    """Section -> (fault, what happens, test), in the order of the tests; a row that several tests share once."""
    collector, said = _Collector(), io.StringIO()
    files = sorted(str(file) for file in (ROOT / "tests").rglob("test_*.py") if "mark.fault" in file.read_text("utf-8"))
    options = ["--collect-only", "-q", "-n0", "-m", "", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    with contextlib.redirect_stdout(said):
        status = pytest.main([*options, "-c", str(ROOT / "pyproject.toml"), *files], plugins=[collector])
    if status != 0:
        raise SystemExit(said.getvalue())
    found: dict[str, dict[Row, None]] = {section: {} for section in SECTIONS}
    for item in collector.items:
        for mark in item.iter_markers("fault"):
            section, fault, happens = mark.args
            values = item.callspec.params if hasattr(item, "callspec") else {}
            test = f"{item.path.relative_to(ROOT / 'tests').as_posix()}::{item.originalname}"
            found[section].setdefault((fault.format_map(values), happens, test))
    return {section: list(of_it) for section, of_it in found.items()}


def page() -> str:
    """The page as Markdown."""
    text, found = HEAD, rows()
    for section, of_it in found.items():
        text += f"\n## {section}\n\n| What goes wrong | What happens | Test |\n|---|---|---|\n"
        for fault, happens, test in of_it:
            text += f"| {_cell(fault)} | {_cell(happens)} | `{test}` |\n"
    return text + f"\n{sum(map(len, found.values()))} rows.\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    made = page()
    if "--check" not in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != made:
        raise SystemExit(f"{PAGE} is out of date: python tests/faults.py")
