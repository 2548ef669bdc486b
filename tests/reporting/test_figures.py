"""Figures as JSON: keys without spaces, and no value that JSON lacks."""

from __future__ import annotations

import json
import math

import pytest

from awq_ext.reporting.figures import as_json, key


@pytest.mark.parametrize(
    ("title", "made"),
    [("memory read at", "memory_read_at"), ("AMX tiles", "amx_tiles"), ("bf16, 1 row or more", "bf16_1_row_or_more")],
)
def test_keys(title: str, made: str) -> None:
    assert key(title) == made


def test_values_that_json_lacks_are_null() -> None:
    figures = {"a": [math.nan, 1.5, (math.inf,)], 3: {"b": -math.inf}}
    assert json.loads(as_json(figures)) == {"a": [None, 1.5, [None]], "3": {"b": None}}
