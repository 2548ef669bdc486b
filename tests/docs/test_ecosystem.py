"""docs/ecosystem.md names tests that exist and the versions that they run against."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ecosystem.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and ".py::" in line]
COUNTERPARTS = ROOT / "tests" / "counterparts"


def test_every_row_names_a_test_and_every_test_a_row() -> None:
    named = {tuple(found) for row in ROWS for found in re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)}
    there = {
        (file.name, test)
        for file in COUNTERPARTS.glob("test_*.py")
        for test in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert named <= there
    # the one on AutoAWQ beside us is not about checkpoints: the page has a section on it
    assert {test for _, test in there - named} == {"test_autoawq_says_what_to_do_with_this_package_installed"}


def test_versions_are_those_of_the_environments() -> None:
    pinned = {
        pin
        for file in (COUNTERPARTS / "requirements").glob("*.txt")
        for pin in re.findall(r"^([\w-]+==[\w.]+)(?: |$)", file.read_text(), re.MULTILINE)
    }
    stated = {f"{name}=={version}" for row in ROWS for name, version in re.findall(r"([\w-]+) (\d+\.\d+\.\d+)", row)}
    assert stated and stated <= pinned
