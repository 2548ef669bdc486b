"""The functions that AutoAWQ looks for in a module of this very name.

AutoAWQ imports its optional CUDA extension (autoawq-kernels) as ``awq_ext``, takes whatever it finds, and calls functions
of it. Where that extension is installed too, which this package hides, they come from there. Else the four that its layers
need are these: the weight is dequantized and multiplied, on any device.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.formats import LAYOUTS, Settings

# of autoawq-kernels' CUDA extension: those of its layers, and those of its fused modules
LAYER_FUNCTIONS = ("dequantize_weights_cuda", "gemm_forward_cuda", "gemmv2_forward_cuda", "gemv_forward_cuda")
FUSED_FUNCTIONS = (
    *("layernorm_forward_cuda", "grouped_gemm_forward", "silu_and_mul", "moe_alig_block_size", "topk_softmax"),
)


def function(name: str) -> Any:
    """What ``awq_ext.<name>`` is to AutoAWQ. AttributeError for a fused module's function when only this package is there."""
    if (extension := _extension()) is not None:
        return getattr(extension, name)
    if name in LAYER_FUNCTIONS:
        return globals()[name]
    raise AttributeError(
        f"awq_ext.{name} is one of AutoAWQ's CUDA kernels (autoawq-kernels), which install under the name awq_ext too and "
        "are not installed; this is the awq_ext quantizer: load the model with fuse_layers=False, or with "
        "awq_ext.from_pretrained"
    )


@cache
def _extension() -> ModuleType | None:
    """autoawq-kernels' module, if it is on the path. A package is found before a module of its name, so nobody else finds it."""
    for folder in sys.path:
        for suffix in EXTENSION_SUFFIXES:
            file = Path(folder or ".") / f"awq_ext{suffix}"
            if file.is_file():
                loader = ExtensionFileLoader("awq_ext", str(file))
                spec = spec_from_file_location("awq_ext", file, loader=loader)
                assert spec is not None
                package = sys.modules["awq_ext"]
                try:
                    module = module_from_spec(spec)
                    loader.exec_module(module)
                finally:
                    sys.modules["awq_ext"] = package  # whose place an extension takes when it is loaded
                return module
    return None


@cache
def _say() -> None:
    warnings.warn(
        "AutoAWQ runs its layers through the awq_ext quantizer, which is installed under the name of AutoAWQ's CUDA kernels: "
        "each call dequantizes the whole weight; awq_ext.from_pretrained(directory) runs the same model on fast kernels",
        UserWarning,
        stacklevel=4,
    )


def _weight(layout: str, qweight: Tensor, scales: Tensor, qzeros: Tensor, group_size: int) -> Tensor:
    """fp16 [N, K] of AutoAWQ's tensors."""
    _say()
    tensors = {"qweight": qweight, "scales": scales, "qzeros": qzeros}
    return LAYOUTS[layout].unpack(tensors, Settings((group_size,))).dequantize().to(torch.float16)


def dequantize_weights_cuda(qweight: Tensor, scales: Tensor, qzeros: Tensor, *unused: Any) -> Tensor:
    """GEMM layout (qweight int32 [K, N/8], scales fp16 [G, N], qzeros int32 [G, N/8]) -> weight fp16 [K, N]."""
    return _weight("awq", qweight, scales, qzeros, len(qweight) // len(scales)).T


def gemm_forward_cuda(x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, *unused: Any) -> Tensor:
    """x fp16 [M, K] times the weight of the GEMM layout: [M, N]."""
    return x @ dequantize_weights_cuda(qweight, scales, qzeros)


def gemv_forward_cuda(
    x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, group_size: int, *unused: Any
) -> Tensor:
    """x fp16 [M, K] times the weight of the GEMV layout (qweight int32 [N, K/8], padded scales and qzeros): [M, N]."""
    return x @ _weight("gemv", qweight, scales, qzeros, group_size).T


gemmv2_forward_cuda = gemv_forward_cuda  # more rows, same arguments, and one more
