"""What a model costs in time: seconds of its layers and calls, timed in turns."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..layers.quant_linear import QuantLinear
from ..layers.quantized_weight import QuantizedWeight
from ..undo import interrupt

LEAST_TURNS = 3
LAYERS = ("float", "int4", "int8")
_CACHES = 256 << 20  # bytes: more than the caches of most processors hold
_MOST_COPIES = 96


@torch.no_grad()
def race(runners: Mapping[str, Callable[[], Any]], seconds: float, least_turns: int = LEAST_TURNS) -> dict[str, float]:
    """Time one call of each runner, in seconds: the best of many, since other programs only slow one down.

    The runners take turns for ``seconds`` each, so that whatever else the machine does meets all of them.
    """
    best = dict.fromkeys(runners, math.inf)
    end, turns = time.perf_counter() + seconds * len(runners), 0
    while turns < least_turns or time.perf_counter() < end:
        turns += 1
        for name, run in runners.items():
            interrupt.check()
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def read_bandwidth(seconds: float = 0.3) -> float:
    """Measure at how many bytes a second this process reads memory that is in no cache, with torch's threads."""
    parts = torch.ones(8, 32 << 20, dtype=torch.uint8)
    turns = itertools.cycle(parts)
    return parts[0].numel() / race({"read": lambda: next(turns).amax()}, seconds)["read"]


def rotating_layers(
    in_features: int, out_features: int, group_size: int, dtype: torch.dtype, names: Sequence[str] = LAYERS
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Make Linears of random weights, each in copies that are called in turn; ``names``: some of LAYERS.

    "float" is torch's Linear in ``dtype``, "int4" ours, "int8" ours with ``compute_dtype="int8"``. There are so many copies that a
    call finds its weight in no cache, as in a model of many layers.
    """
    linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
    weight = QuantizedWeight.of_codes(*kernels.quantize_weight(linear.weight.detach().float(), group_size), group_size)

    def layer(name: str) -> nn.Module:
        if name == "float":
            return copy.deepcopy(linear)  # a copy is made sooner than random numbers
        made = QuantLinear.from_packed(linear, weight)
        made.compute = "int8" if name == "int8" else "auto"
        return made

    runners = {}
    for name in names:
        size = linear.weight.nbytes if name == "float" else layer(name).nbytes
        copies = min(_MOST_COPIES, max(2, -(-_CACHES // size)))
        turns = itertools.cycle([layer(name) for _ in range(copies)])
        runners[name] = lambda x, turns=turns: next(turns)(x)
    return runners


def layer_seconds(
    rows: Sequence[int], in_features: int, out_features: int, seconds: float = 0.1
) -> dict[int, dict[str, float]]:
    """Measure shortly how long a bf16 Linear and an int4 one take: rows -> {"float": seconds, "int4": seconds}.

    One turn is enough for a machine so slow that more would be waited for.
    """
    runners = rotating_layers(in_features, out_features, 128, torch.bfloat16, ("float", "int4"))
    found = {}
    for count in rows:
        x = torch.randn(count, in_features).bfloat16()
        found[count] = race({name: partial(run, x) for name, run in runners.items()}, seconds, least_turns=1)
    return found
