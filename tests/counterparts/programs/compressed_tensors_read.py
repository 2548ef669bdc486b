"""compressed_tensors_read.py FOLDER WEIGHTS ...: what the layers of compressed-tensors directories stand for.

WEIGHTS (safetensors): [out, in], as Transformers finds them in the directory and compressed-tensors' own compressor unpacks
them, without running the model.
"""

from __future__ import annotations

import sys

import torch
from compressed_tensors.compressors import ModelCompressor
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def decompressed_model(folder: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model, and the name of each quantized layer -> its weight."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    layers = [name for name, module in model.named_modules() if hasattr(module, "weight_scale")]
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.decompress_model(model)
    return model, {name: model.get_submodule(name).weight.detach().contiguous() for name in layers}


if __name__ == "__main__":
    for folder, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        _, weights = decompressed_model(folder)
        assert weights
        save_file(weights, out)
