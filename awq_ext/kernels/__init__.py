"""Kernels, chosen by the device of the tensor: compiled C++ (``awq_ext._C``) on the CPU, plain torch (``reference``) elsewhere.

On an NVIDIA GPU the compiled ones are those of ``cuda``, where they were built (docs/cuda.md). All hold the same functions and the
same ``ActivationStats``. ``AWQ_EXT_BACKEND=reference`` in the environment selects the reference everywhere (to test it without
another device, or to see whether a problem comes from compiled code); ``compiled``, empty or unset is the normal choice. The
variable is read at every call.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import cuda, reference

BACKENDS = ("compiled", "reference")


def kernels_for(device: torch.device | str) -> ModuleType:
    """Choose the module whose functions take tensors on ``device``. ValueError for an unknown AWQ_EXT_BACKEND."""
    choice = os.environ.get("AWQ_EXT_BACKEND") or "compiled"
    if choice not in BACKENDS:
        raise ValueError(f"environment variable AWQ_EXT_BACKEND: expected one of {', '.join(BACKENDS)}, got {choice!r}")
    kind = torch.device(device).type
    if choice == "reference" or kind not in ("cpu", "cuda"):
        return reference
    if kind == "cpu":
        return _C
    return cuda if cuda.found() is not None else reference


def _by_device(specification: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that runs the kernel of this name on the device of its first argument."""

    @functools.wraps(specification)
    def dispatched(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(kernels_for(tensor.device), specification.__name__)(tensor, *args, **kwargs)

    return dispatched


quantize_weight = _by_device(reference.quantize_weight)
dequantize_weight = _by_device(reference.dequantize_weight)
pack_int4 = _by_device(reference.pack_int4)
unpack_int4 = _by_device(reference.unpack_int4)
quadratic_loss = _by_device(reference.quadratic_loss)
code_losses = _by_device(reference.code_losses)
scale_losses = _by_device(reference.scale_losses)
search_clip = _by_device(reference.search_clip)
gptq_factor = _by_device(reference.gptq_factor)
gptq_quantize = _by_device(reference.gptq_quantize)
refine_quantized = _by_device(reference.refine_quantized)
learned_weight = _by_device(reference.learned_weight)
move_learned = _by_device(reference.move_learned)
tile_codes = _by_device(reference.tile_codes)
untile_codes = _by_device(reference.untile_codes)


def activation_stats(in_features: int, device: torch.device | str = "cpu") -> Any:
    """Make an empty ``ActivationStats`` for inputs [..., in_features] on ``device``."""
    return kernels_for(device).ActivationStats(in_features, device=device)
