"""Every kernel again in plain torch: the executable specification, the test oracle, and what runs where no C++ kernel does.

The functions here and those of the compiled ``awq_ext._C`` have the same names, arguments and results, so a caller can use either.
The files are named after those of ``csrc/drivers``. Symbols: N = out_features, K = in_features, g = group length along K,
G = ceil(K / g) groups per row (the last may be short). ``group_size = -1`` means one group per row.

Sources: AWQ, arXiv 2306.00978, section 3.2 (scales, clip); the quantizer is the usual group-wise affine one.
"""

from __future__ import annotations

# ruff: noqa: F401  (imported for callers: reference.NAME)
from .gptq import gptq_factor, gptq_quantize
from .learned import learned_weight, move_learned
from .linear import RUN_CHANNELS, int8_activations, quant_linear, quant_scale_gradient, quant_weight, scale_gradient
from .quantize import SCALE_RANGE, dequantize_weight, pack_int4, quantize_weight, unpack_int4
from .refine import refine_quantized
from .search import code_losses, quadratic_loss, scale_losses, search_clip
from .sizes import expand_groups, group_count, group_length, in_groups
from .stats import ActivationStats
from .tiles import (
    TILE_BITS,
    TILE_OUTPUTS,
    step_count,
    tile_codes,
    tile_scales,
    tile_zeros,
    untile_codes,
    untile_scales,
    untile_zeros,
)
