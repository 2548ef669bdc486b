"""A thousand models made and dropped: the process does not grow."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import models
import psutil
import pytest

import awq_ext

pytestmark = pytest.mark.exhaustive

CYCLES, WARM = 1000, 100
# A tensor of the model (a kilobyte) kept at each cycle would be a megabyte, a whole model ten. Allocators move too, so that two
# megabytes are let pass in one half of the cycles: what grows without end grows in both.
GROWTH = 2 * 2**20  # bytes


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.mark.fault("Memory", "`{what}` is called a thousand times", "The process does not grow")
@pytest.mark.parametrize("what", ["quantize", "load", "save"])
def test_a_thousand_times(what: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"group_size": 16, "n_grid": 2, "progress": False}
    case = models.make("mlp")
    saved = awq_ext.save(awq_ext.quantize(case.model, case.batches, **options), tmp_path / "x")

    def cycle() -> None:
        again = models.make("mlp")
        if what == "quantize":
            awq_ext.quantize(again.model, again.batches, **options)
        elif what == "load":
            awq_ext.load(again.model, saved)
        else:
            awq_ext.save(case.model, tmp_path / "y", overwrite=True)

    sizes = []
    for number in range(CYCLES + 1):
        if number in (WARM, (WARM + CYCLES) // 2, CYCLES):
            sizes.append(resident())
        cycle()
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    assert min(first, second) < GROWTH, f"it grew by {first} bytes, then by {second}"
    assert first + second < 4 * GROWTH
