"""Lay out quantized Linears as other tools do: ``LAYOUTS`` by name, one file each; docs/formats.md says who reads which."""

from __future__ import annotations

from .compressed_tensors import CompressedTensors, CompressedTensorsW8A8
from .gemm import Gemm
from .gemv import Gemv
from .gemv_fast import GemvFast, LlmAwq
from .gptq import Gptq
from .in_memory import InMemory
from .layout import Facts, Layout, Summary
from .modelopt import ModelOpt
from .native import Native
from .packed import CheckpointError, PackedLinear, ShapeError
from .runtimes.gguf import Gguf
from .runtimes.mlx import Mlx
from .settings import Settings

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "Facts",
    "InMemory",
    "Layout",
    "PackedLinear",
    "Settings",
    "ShapeError",
    "Summary",
    "layout",
]
LAYOUTS: dict[str, Layout] = {
    each.name: each
    for each in (
        Gemm(),
        Gemv(),
        GemvFast(),
        LlmAwq(),
        CompressedTensors(),
        CompressedTensorsW8A8(),
        Gptq(),
        ModelOpt(),
        Gguf(),
        Mlx(),
        Native(),
    )
}


def layout(name: str) -> Layout:
    """Look up a layout by its name; ValueError for an unknown one."""
    if name not in LAYOUTS:
        raise ValueError(f"format={name!r}: choose one of {', '.join(map(repr, LAYOUTS))}")
    return LAYOUTS[name]
