"""Members: experts in the order of their numbers, and the names of those that are missing."""

from __future__ import annotations

import pytest

from awq_ext.checkpoints.joined import Member, absent_experts, natural_order

PATTERN = "mlp.experts.*.{}.weight"


def members(*numbers: int, leaf: str = "up_proj") -> list[Member]:
    return [Member(f"model.layers.10.mlp.experts.{e}.{leaf}.weight", PATTERN.format(leaf)) for e in numbers]


def test_numbers_in_names_are_numbers() -> None:
    names = [member.name for member in members(*range(12))]
    assert sorted(sorted(names), key=natural_order) == names
    assert sorted(names) != names


@pytest.mark.parametrize(
    ("found", "count", "absent"),
    [
        (members(0, 1, 2), 0, []),
        (members(2, 0), 0, [1]),
        (members(0, 1), 4, [2, 3]),
        ([*members(0, 1, 2, leaf="gate_proj"), *members(0, 2)], 0, [1]),
        ([Member("model.layers.0.mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj")], 4, []),
    ],
)
def test_missing_experts_have_names(found: list[Member], count: int, absent: list[int]) -> None:
    assert absent_experts(found, count) == [member.name for member in members(*absent)]
