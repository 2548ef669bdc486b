"""Sizes of packed weights, by hand."""

from __future__ import annotations

import pytest

from awq_ext import LayerReport
from awq_ext.reporting.sizes import linear_bytes, packed_bytes, stored_bits


def test_groups_have_a_scale_and_a_zero() -> None:
    assert packed_bytes(128, 8, 64, 4) == 8 * (128 * 4 + 2 * 20) // 8
    assert packed_bytes(100, 8, 64, 8) == 8 * (100 * 8 + 2 * 24) // 8  # the short last group counts as one
    assert packed_bytes(100, 1, -1, 3) == packed_bytes(100, 1, 128, 3) == -(-(300 + 20) // 8)


def test_bits_are_averaged_over_weights() -> None:
    small = LayerReport("a", 64, 8, "int4", bits=4, group_size=64)
    large = LayerReport("b", 64, 24, "int8", bits=8, group_size=64)
    assert stored_bits([small]) == 4 + 20 / 64
    assert stored_bits([small, large]) == pytest.approx((4 + 20 / 64 + 3 * (8 + 24 / 64)) / 4)
    assert stored_bits([]) == 0 and linear_bytes(small) == 64 * 8 // 2 + 8 * 20 // 8
