"""mlx_read.py FOLDER WEIGHTS ...: mlx-lm loads directories; WEIGHTS get what their quantized layers stand for.

WEIGHTS safetensors: NAME fp32 [out, in], dequantized in float32, whatever dtype scales and biases have.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
for folder, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    model, _ = load_model(Path(folder))
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.QuantizedLinear):
            scales, biases = (layer[leaf].astype(mx.float32) for leaf in ("scales", "biases"))
            sizes = {"group_size": layer.group_size, "bits": layer.bits}
            found[name] = mx.dequantize(layer.weight, scales, biases, **sizes)
    assert found
    mx.save_safetensors(out, found)
