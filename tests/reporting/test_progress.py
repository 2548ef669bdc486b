"""Progress where no bar can be drawn: a line a minute, with the time that is left."""

from __future__ import annotations

import pytest

from awq_ext.reporting import progress
from awq_ext.reporting.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("part", "last"), [(False, ["awq_ext: scoring: window 4/4, 2 min, about 0 s left"]), (True, [])]
)
def test_a_line_a_minute(part: bool, last: list[str], clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(4, "scoring", "window", show=True, part=part) as bar:
        for seconds in (45, 90, 100, 140):
            clock[0] = seconds
            bar.update()
        assert bar.done == 4
    first = "awq_ext: scoring: window 2/4, 2 min, about 2 min left"
    assert capsys.readouterr().err.splitlines() == [first, *last]


def test_nothing_unasked(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, "scoring", "window", show=False) as bar:
        clock[0] = 1000
        bar.update()
    assert capsys.readouterr().err == ""
