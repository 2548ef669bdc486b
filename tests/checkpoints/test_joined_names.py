"""Parts of a joined tensor: experts in the order of their numbers, and the names of those that are missing."""

from __future__ import annotations

import pytest

from awq_ext.checkpoints.joined import Part, absent_experts, natural_order

PATTERN = "mlp.experts.*.{}.weight"


def parts(*numbers: int, leaf: str = "up_proj") -> list[Part]:
    return [Part(f"model.layers.10.mlp.experts.{e}.{leaf}.weight", PATTERN.format(leaf)) for e in numbers]


def test_numbers_in_names_are_numbers() -> None:
    names = [part.name for part in parts(*range(12))]
    assert sorted(sorted(names), key=natural_order) == names
    assert sorted(names) != names


@pytest.mark.parametrize(
    ("found", "count", "absent"),
    [
        (parts(0, 1, 2), 0, []),
        (parts(2, 0), 0, [1]),
        (parts(0, 1), 4, [2, 3]),
        ([*parts(0, 1, 2, leaf="gate_proj"), *parts(0, 2)], 0, [1]),
        ([Part("model.layers.0.mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj")], 4, []),
    ],
)
def test_missing_experts_have_names(found: list[Part], count: int, absent: list[int]) -> None:
    assert absent_experts(found, count) == [part.name for part in parts(*absent)]
