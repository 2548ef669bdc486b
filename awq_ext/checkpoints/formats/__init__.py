"""Checkpoint layouts: one short file each. ``LAYOUTS`` has them by name; docs/formats.md tells who reads which."""

from __future__ import annotations

from .compressed_tensors import CompressedTensors
from .gemm import Gemm
from .gemv import Gemv
from .gemv_fast import GemvFast, LlmAwq
from .gptq import Gptq
from .layout import Facts, Layout, Settings, Summary
from .modelopt import ModelOpt
from .native import Native
from .packed import CheckpointError, PackedLinear

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "Facts",
    "Layout",
    "PackedLinear",
    "Settings",
    "Summary",
    "layout",
]
LAYOUTS: dict[str, Layout] = {
    each.name: each
    for each in (Gemm(), Gemv(), GemvFast(), LlmAwq(), CompressedTensors(), Gptq(), ModelOpt(), Native())
}


def layout(name: str) -> Layout:
    """The layout of this name; ValueError for an unknown one."""
    if name not in LAYOUTS:
        raise ValueError(f"format={name!r}: choose one of {', '.join(map(repr, LAYOUTS))}")
    return LAYOUTS[name]
