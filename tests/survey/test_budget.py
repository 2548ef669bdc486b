"""Planned memory, added up by hand for a small survey."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from awq_ext.config import AwqConfig
from awq_ext.forwards.calls import Call
from awq_ext.forwards.lockstep import Block
from awq_ext.survey.budget import growth_of, planned_bytes, statistics_bytes
from awq_ext.survey.groups import ScaleGroup
from awq_ext.survey.survey import BlockSurvey

SLAB = 32 << 20


def surveyed(**linears: nn.Linear) -> BlockSurvey:
    """A block of Linears that all read the same tensor."""
    return BlockSurvey(Block("", nn.Identity()), linears, [ScaleGroup(tuple(linears), None)], input_bytes=1000)


def test_statistics_are_those_of_each_input() -> None:
    one = surveyed(a=nn.Linear(8, 3), b=nn.Linear(8, 5))
    assert statistics_bytes(one) == 4 * 64 + 16 * 8
    apart = BlockSurvey(one.block, one.linears, [ScaleGroup(("a", "b"), None, parts=(("a",), ("b",)))], 0)
    assert statistics_bytes(apart) == 2 * statistics_bytes(one)


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"bias_correction": False}, 0),
        ({"bias_correction": False, "method": "gptq"}, 12 * 64),  # three fp32 [K, K]
        ({"bias_correction": True}, 4 * 64),  # the moment around the mean
        (
            {"bias_correction": False, "bits": 3, "packed": False},
            4 * 32 - 0.6 * 32 + 2 * 0.5 * 32,
        ),  # whole weights, and trials a byte a code
    ],
    ids=str,
)
def test_the_plan_is_the_sum_of_its_terms(settings: dict[str, Any], more: float) -> None:
    one = surveyed(a=nn.Linear(8, 4))
    states, statistics, codes = 3 * 1000, 4 * 64 + 16 * 8, 0.6 * 32
    scratch = int(2 * 64 + 32 * (4 + 1.2) + 8 * 32 + SLAB)
    found = planned_bytes([one], 3.0, AwqConfig(group_size=-1, **settings))
    assert abs(found - (states + statistics + codes + scratch + more)) <= 1


def test_blocks_share_scratch_and_statistics_but_not_new_layers() -> None:
    config, small = AwqConfig(group_size=-1, bias_correction=False), surveyed(a=nn.Linear(8, 4))
    large = surveyed(b=nn.Linear(16, 4))
    both = planned_bytes([small, large], 1.0, config)
    assert both - planned_bytes([large], 1.0, config) == pytest.approx(0.6 * 32, abs=1)


def test_growth_is_told_by_elements() -> None:
    def call(count: int) -> Call:
        return Call((torch.zeros(1, count),), {"mask": torch.zeros(count)})

    assert growth_of([call(4), call(6), call(2)]) == 3.0
    assert growth_of([Call(), call(1)]) == 2.0


def test_half_precision_weights_need_less() -> None:
    config = AwqConfig(group_size=-1, bias_correction=False)

    def planned(dtype: torch.dtype) -> int:
        return planned_bytes([surveyed(a=nn.Linear(8, 4).to(dtype))], 1.0, config)

    assert planned(torch.float32) - planned(torch.bfloat16) == 2 * 32
