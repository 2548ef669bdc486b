"""The kernels of ``csrc/cuda``, under the names of ``reference``, for tensors on an NVIDIA GPU.

They are in a library of their own, which a build with AWQ_EXT_CUDA=ON makes (docs/cuda.md); where it is missing ``reference`` does
the work. Large matrix products, and Cholesky's factor, are torch's.
"""

from __future__ import annotations

# ruff: noqa: F401  (imported for callers: cuda.NAME)
from ..reference import gptq_factor, learned_weight, move_learned
from .descent import gptq_quantize, refine_quantized
from .library import found, state
from .linear import quant_linear, quant_weight
from .quantize import dequantize_weight, pack_int4, quantize_weight, tile_codes, unpack_int4, untile_codes
from .search import code_losses, quadratic_loss, scale_losses, search_clip
from .stats import ActivationStats
