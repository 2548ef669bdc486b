"""gptqmodel_read.py FOLDER WEIGHTS: what the layers of a "gptq" directory stand for to GPTQModel.

WEIGHTS (safetensors): float32 [out, in] of each layer, dequantized by the layers that GPTQModel builds and fills itself.
"""

from __future__ import annotations

import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file

folder, out = sys.argv[1:]
model = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
layers = {name: module for name, module in model.named_modules() if hasattr(module, "dequantize_weight")}
weights = {name: layer.dequantize_weight().T.float().contiguous() for name, layer in layers.items()}
assert weights
save_file(weights, out, metadata={name: str(layer.bits) for name, layer in layers.items()})
