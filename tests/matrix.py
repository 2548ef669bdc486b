"""Combinations of parameters: enough of them for every run, all of them for an exhaustive one."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

At = tuple[int, ...]  # the place of a combination's value on each axis


def product(*axes: Sequence[Any], together: int = 2) -> list[Any]:
    """All combinations of one value from each axis, for ``pytest.mark.parametrize``.

    Those that a usual run tries are enough for any values of any ``together`` axes to meet; the others are exhaustive.
    """
    every = list(itertools.product(*(range(len(axis)) for axis in axes)))
    usual = _covering(every, together)
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, at, strict=True)), marks=() if at in usual else pytest.mark.exhaustive
        )
        for at in every
    ]


def _covering(every: list[At], together: int) -> set[At]:
    """Greedy: next comes what meets most that has not met yet; of several, the one whose values were tried least."""

    def met(at: At) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(at), together))

    left = set().union(*map(met, every))
    tried: Counter[tuple[int, int]] = Counter()
    chosen: set[At] = set()
    while left:
        best = max(every, key=lambda at: (len(met(at) & left), -sum(tried[value] for value in enumerate(at))))
        chosen.add(best)
        tried.update(enumerate(best))
        left -= met(best)
    return chosen
