"""The page of faults is drawn from the tests that try them."""

from __future__ import annotations

import re
from pathlib import Path

from faults import PAGE, SECTIONS
from programs import run_python


def test_the_page_is_up_to_date() -> None:
    """``python tests/faults.py`` writes it."""
    done = run_python(str(Path(__file__).with_name("faults.py")), "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_has_many_rows_of_plain_words() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!What goes|---)(.+) \| (.+) \| `(.+)` \|$", text, flags=re.MULTILINE)
    assert len(rows) >= 80
    assert text.endswith(f"\n{len(rows)} rows.\n")
    for fault, happens, _ in rows:
        assert "{" not in fault.replace("{'", "")
        assert len(fault) > 4
        assert len(happens) > 10
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == list(SECTIONS)
