"""Answer AutoAWQ, which takes this package for its CUDA kernels.

It imports its optional extension (autoawq-kernels) as ``awq_ext`` and calls functions of whatever it finds. Where that
extension is installed too, which this package hides, they come from there. Where our own CUDA kernels are, those for its Linears do
the work: a layer's tensors are brought into our layout at its first call, and kept beside the layer's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

FUNCTIONS = (
    *("dequantize_weights_cuda", "gemm_forward_cuda", "gemmv2_forward_cuda", "gemv_forward_cuda"),
    *("layernorm_forward_cuda", "grouped_gemm_forward", "silu_and_mul", "moe_alig_block_size", "topk_softmax"),
)


def function(name: str) -> Any:
    """Find a function of autoawq-kernels; AttributeError that says what to do when only this package is there."""
    if (extension := _extension()) is not None:
        return getattr(extension, name)
    if (own := _own(name)) is not None:
        return own
    raise AttributeError(
        f"awq_ext.{name} is a CUDA kernel of AutoAWQ (autoawq-kernels, not installed here), which looks for it under the name "
        "of this package: load the model with awq_ext.from_pretrained(directory), or install autoawq-kernels"
    )


def _own(name: str) -> Callable[..., Any] | None:
    """Find what does the same on our CUDA kernels; None where they were not built, see no GPU, or have nothing of the kind."""
    if "torch" not in sys.modules or name not in FUNCTIONS[:4]:
        return None
    from ..kernels import cuda

    if cuda.found() is None:
        return None
    from . import autoawq_layers

    run = {
        "dequantize_weights_cuda": autoawq_layers.dequantize,
        "gemm_forward_cuda": partial(autoawq_layers.linear, "awq"),
        "gemmv2_forward_cuda": partial(autoawq_layers.linear, "gemv"),
        "gemv_forward_cuda": partial(autoawq_layers.linear, "gemv"),
    }
    return run[name]


@cache
def _extension() -> ModuleType | None:
    """Load autoawq-kernels' module if it is on the path, where nobody else finds it: packages come before modules."""
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
