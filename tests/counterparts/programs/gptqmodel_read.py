"""gptqmodel_read.py FOLDER WEIGHTS ...: what the layers of "gptq" and "awq" directories stand for to GPTQModel.

WEIGHTS (safetensors): float32 [out, in] of each layer, dequantized by the layers that GPTQModel builds and fills itself ("gptq"),
or by the function that its layers call ("awq"). Metadata: the bits of each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import save_file


def weight_of(layer: BaseQuantLinear) -> torch.Tensor:
    if hasattr(layer, "dequantize_weight"):
        return layer.dequantize_weight()
    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size)


for folder, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    method = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["quant_method"]
    backend = BACKEND.GPTQ_TORCH if method == "gptq" else BACKEND.AWQ_TORCH
    model = GPTQModel.load(folder, backend=backend, device="cpu", dtype=torch.float16).model
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseQuantLinear)}
    weights = {name: weight_of(layer).T.float().contiguous() for name, layer in layers.items()}
    assert weights
    save_file(weights, out, metadata={name: str(layer.bits) for name, layer in layers.items()})
