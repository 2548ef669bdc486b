"""Planned memory, added up by hand for a small survey."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from awq_ext.config import AwqConfig
from awq_ext.forwards.calls import Call
from awq_ext.forwards.lockstep import Block
from awq_ext.survey import budget
from awq_ext.survey.budget import growth_of, made_bytes, planned_bytes, statistics_bytes
from awq_ext.survey.groups import ScaleGroup
from awq_ext.survey.survey import BlockSurvey

HEAP = 16 << 20


def surveyed(input_bytes: int = 1000, **linears: nn.Linear) -> BlockSurvey:
    """A block of Linears that all read the same tensor."""
    return BlockSurvey(Block("", nn.Identity()), linears, [ScaleGroup(tuple(linears), None)], input_bytes)


def in_turn(**linears: nn.Linear) -> BlockSurvey:
    """A block of Linears that each read a tensor of their own."""
    return BlockSurvey(Block("", nn.Identity()), linears, [ScaleGroup((name,), None) for name in linears], 0)


def test_statistics_are_those_of_each_input() -> None:
    one = surveyed(a=nn.Linear(8, 3), b=nn.Linear(8, 5))
    assert statistics_bytes(one) == 4 * 64 + 16 * 8
    apart = BlockSurvey(one.block, one.linears, [ScaleGroup(("a", "b"), None, parts=(("a",), ("b",)))], 0)
    assert statistics_bytes(apart) == 2 * statistics_bytes(one)


@pytest.mark.parametrize(
    ("group_size", "bits", "codes"), [(-1, 4, 4 * (20 + 3)), (16, 4, 4 * (20 + 3 * 3)), (32, 8, 4 * (40 + 3 * 2))]
)
def test_new_layers_are_codes_scales_and_zeros(group_size: int, bits: int, codes: int) -> None:
    one = surveyed(a=nn.Linear(40, 4))
    assert made_bytes([one], AwqConfig(group_size=group_size, bits=bits)) == codes
    assert made_bytes([one], AwqConfig(group_size=group_size, bits=bits, packed=False)) == 4 * 40 * 4


WEIGHT = 32 * 4  # bytes of a Linear of 8 and 4 channels in fp32
CODES = 2 * 4 * (4 + 3)  # with clips and without
ROUNDING = 32 * (4 + 1 + 1.5) + 2 * 64 + 8 * 32  # rows and codes; the packed moment; a slab
GPTQ = 32 * (4 + 1 + 1.5) + 4 * 64 + max(4 * 64, 2 * 64 + 8 * 32) + 8 * 32  # and what the heap keeps


@pytest.mark.parametrize(
    ("settings", "statistics", "step"),
    [
        # a layer is rounded anew while the trial weights of the block are there
        ({"bias_correction": False}, 0, CODES + WEIGHT + ROUNDING),
        ({"bias_correction": True}, 4 * 64, CODES + WEIGHT + ROUNDING),
        ({"bias_correction": False, "clip": False}, 0, CODES / 2 + WEIGHT + ROUNDING),
        # the moment, its factor, and the moment once more
        ({"bias_correction": False, "method": "gptq"}, 0, GPTQ),
    ],
    ids=str,
)
def test_the_plan_is_the_largest_step_of_a_block(
    settings: dict[str, Any], statistics: int, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget._C, "isa", lambda: "avx512")
    one = surveyed(10, a=nn.Linear(8, 4))
    held = 3 * 10 + 4 * 64 + 16 * 8 + statistics
    assert planned_bytes([one], 3.0, AwqConfig(group_size=-1, **settings)) == held + int(step) + HEAP


def test_rows_on_tile_registers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    config, one = AwqConfig(group_size=-1, bias_correction=False, method="gptq"), surveyed(10, a=nn.Linear(8, 4))
    monkeypatch.setattr(budget._C, "isa", lambda: "avx512")
    planned = planned_bytes([one], 3.0, config)
    monkeypatch.setattr(budget._C, "isa", lambda: "amx")
    assert planned_bytes([one], 3.0, config) - planned == 13 * 32


def test_a_forward_needs_a_few_of_the_widest_tensors() -> None:
    # four while it runs; of one all inputs and outputs of Linears are kept, here 8 + 4 channels
    config, one = AwqConfig(group_size=-1), surveyed(a=nn.Linear(8, 4))
    wide = replace(one, widest_bytes=1 << 20)
    grown = planned_bytes([wide], 1.0, config) - planned_bytes([replace(wide, widest_bytes=2 << 20)], 1.0, config)
    assert grown == -(4 + 12 / 8) * (1 << 20)


def test_codes_of_linears_that_were_rounded_before_are_counted() -> None:
    config = AwqConfig(group_size=-1, bias_correction=False, method="gptq", clip=False, fold="never")
    small, large = nn.Linear(8, 64), nn.Linear(512, 512)
    # rounded from the last to the first: when it is the turn of the large one, nothing is there yet or the small one's codes
    behind, ahead = (
        planned_bytes([one], 1.0, config) for one in (in_turn(a=large, b=small), in_turn(a=small, b=large))
    )
    assert behind - ahead == 64 * (4 + 3)


def test_blocks_share_all_but_new_layers() -> None:
    config, small = AwqConfig(group_size=-1, bias_correction=False), surveyed(a=nn.Linear(8, 4))
    large, alone = surveyed(b=nn.Linear(256, 4)), 4 * (4 + 3)
    for streamed, more in ((False, alone), (True, 0)):
        both = planned_bytes([small, large], 1.0, config, streamed)
        assert both - planned_bytes([large], 1.0, config, streamed) == more
    # what is made of the last block is there when the others are done
    assert planned_bytes([large, small], 1.0, config) == planned_bytes([large], 1.0, config)


def test_two_batches_stay_in_memory_where_others_go_to_the_disk() -> None:
    config, one = AwqConfig(group_size=-1), surveyed(a=nn.Linear(8, 4))
    assert planned_bytes([one], 9.0, config) - planned_bytes([one], 9.0, config, spilled=True) == 7 * 1000


def test_experts_of_one_kind_are_tried_together() -> None:
    linears = {name: nn.Linear(64, 64) for name in "abcd"}
    group = ScaleGroup(tuple(linears), None, parts=tuple((name,) for name in linears), experts=frozenset(linears))
    apart = replace(surveyed(**linears), groups=[replace(group, experts=frozenset())])
    together = planned_bytes([replace(apart, groups=[group])], 1.0, AwqConfig(group_size=-1, clip="auto"))
    assert together > planned_bytes([apart], 1.0, AwqConfig(group_size=-1, clip="auto"))


def test_growth_is_told_by_elements() -> None:
    def call(count: int) -> Call:
        return Call((torch.zeros(1, count),), {"mask": torch.zeros(count)})

    assert growth_of([call(4), call(6), call(2)]) == 3.0
    assert growth_of([Call(), call(1)]) == 2.0


def test_half_precision_weights_need_less() -> None:
    config = AwqConfig(group_size=-1, bias_correction=False)

    def planned(dtype: torch.dtype) -> int:
        return planned_bytes([surveyed(a=nn.Linear(512, 512).to(dtype))], 1.0, config)

    # the trial weight, and a copy of the rows that are rounded
    assert planned(torch.float32) - planned(torch.bfloat16) == 2 * 2 * 512**2
