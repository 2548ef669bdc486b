"""mlx_weights.py LAYERS WEIGHTS: MLX dequantizes quantized weights.

LAYERS safetensors: of each layer NAME.weight, NAME.scales and NAME.biases, and in the metadata NAME -> "GROUP_SIZE BITS".
WEIGHTS safetensors: NAME fp32 [N, K], computed in float32, whatever dtype scales and biases have.
"""

from __future__ import annotations

import sys

import mlx.core as mx

layers, out = sys.argv[1:]
tensors, metadata = mx.load(layers, return_metadata=True)
found = {}
for name, said in metadata.items():
    size, bits = map(int, said.split())
    scales, biases = (tensors[f"{name}.{leaf}"].astype(mx.float32) for leaf in ("scales", "biases"))
    found[name] = mx.dequantize(tensors[f"{name}.weight"], scales, biases, group_size=size, bits=bits)
    assert found[name].dtype == mx.float32
mx.save_safetensors(out, found)
