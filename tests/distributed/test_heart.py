"""Signs of life: who is silent is named, and who was asleep does not blame others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch import distributed as dist

from awq_ext.distributed.heart import Heart

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
NAMES = ["process 0", "process 1"]
TIMEOUT = 2.0


@pytest.fixture
def hearts() -> Iterator[list[Heart]]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    both = [Heart(store, rank, NAMES, TIMEOUT) for rank in range(2)]
    for one in both:
        one.start()
    yield both
    for one in both:
        one.stop()


def problem_within(heart: Heart, seconds: float) -> str:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not heart.problem():
        time.sleep(TIMEOUT / 20)
    return heart.problem()


def test_nobody_is_blamed_while_all_live(hearts: list[Heart]) -> None:
    assert problem_within(hearts[0], 1.5 * TIMEOUT) == ""
    assert hearts[1].problem() == ""


def test_a_silent_one_is_named_by_the_other(hearts: list[Heart]) -> None:
    hearts[1].stop()
    said = problem_within(hearts[0], 10 * TIMEOUT)
    assert said.startswith("process 1 gave no sign of life for 2 s")


def test_a_failure_is_told_at_once_and_the_first_counts(hearts: list[Heart]) -> None:
    hearts[0].fail("process 0 failed: first")
    hearts[1].fail("process 1 failed: second")
    assert problem_within(hearts[1], 10 * TIMEOUT) == "process 0 failed: first"


def test_all_have_left_once_each_has(hearts: list[Heart]) -> None:
    hearts[0].leave()
    hearts[0].leave()
    assert not hearts[0].everyone_left()
    hearts[1].leave()
    assert hearts[0].everyone_left()
