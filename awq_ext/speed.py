"""The speed of models, measured side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

LEAST_TURNS = 3


@torch.no_grad()
def race(runners: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Seconds of one call of each runner: the best of many, since other programs only slow one down.

    The runners take turns for ``seconds`` each, so that whatever else the machine does meets all of them.
    """
    best = dict.fromkeys(runners, math.inf)
    end, turns = time.perf_counter() + seconds * len(runners), 0
    while turns < LEAST_TURNS or time.perf_counter() < end:
        turns += 1
        for name, run in runners.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
    return best
