"""Presets by the time that quantizing may take: ``effort="fast"``, ``"balanced"`` or ``"best"``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What each stands for; what it gives and costs: docs/research-notes-tuning.md.
EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {
        "method": "awq+gptq",
        "builtin_text": True,
        "max_calib_tokens": 8192,
        "n_grid": 10,
        "refine": 0,
        "objective": "layer",
        "learn_rounding": 0,
        "tune_scales": 0,
    },
    "balanced": {
        "method": "awq+gptq",
        "builtin_text": True,
        "max_calib_tokens": 16384,
        "weighed_batches": 4,
        "learn_rounding": 0,
        "tune_scales": 0,
    },
    "best": {"method": "awq+gptq", "builtin_text": True, "weighed_batches": 4, "learn_rounding": 160, "tune_scales": 0},
}


def by_effort(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say settings as they can be given shortest: fields that together are an effort by its name, as ``effort``."""
    for name, fields in EFFORTS.items():
        if all(config.get(field) == value for field, value in fields.items()):
            return {"effort": name, **{field: value for field, value in config.items() if field not in fields}}
    return dict(config)


def effort_fields(effort: Any) -> Mapping[str, Any]:
    """Return the fields of AwqConfig that an effort stands for; ValueError for one that there is not."""
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise ValueError(f"AwqConfig.effort={effort!r}: choose one of {', '.join(map(repr, EFFORTS))}")
    return EFFORTS[effort]
