"""mlx_quantize.py OUT: MLX quantizes a random matrix [64, 512] of three dtypes to 4 and 8 bits, in groups of 64.

OUT safetensors: DTYPE.BITS.weight, .scales and .biases, and .dequantized fp32, computed in float32.
"""

from __future__ import annotations

import sys

import mlx.core as mx

mx.random.seed(0)
weight = mx.random.normal((64, 512)) * 0.02
found = {}
for name in ("float16", "bfloat16", "float32"):
    for bits in (4, 8):
        codes, scales, biases = mx.quantize(weight.astype(getattr(mx, name)), group_size=64, bits=bits)
        wide = (each.astype(mx.float32) for each in (scales, biases))
        parts = {"weight": codes, "scales": scales, "biases": biases}
        parts["dequantized"] = mx.dequantize(codes, *wide, group_size=64, bits=bits)
        found |= {f"{name}.{bits}.{leaf}": part for leaf, part in parts.items()}
mx.save_safetensors(sys.argv[1], found)
