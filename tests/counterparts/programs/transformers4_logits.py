"""transformers4_logits.py FOLDER TOKENS RESULT DTYPE: Transformers 4, without AutoAWQ, loads a directory that we wrote and runs it.

TOKENS (safetensors): "tokens" int64 [B, T]. RESULT (safetensors): "logits" fp32 [B, T, V], and by name the weight that each
int4 layer stands for, fp32 [N, K], as its kernels read it. DTYPE: that of float parameters, such as bfloat16.
"""

from __future__ import annotations

import sys

# what its AwqConfig asks for although our layers do not need it
sys.modules["awq"] = None
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import is_auto_awq_available

import awq_ext
from awq_ext.layers.ops import quant_weight

assert transformers.__version__.startswith("4.")
assert not is_auto_awq_available()
folder, tokens, result, dtype = sys.argv[1:]
awq_ext.register_with_transformers(awq_ext.integrations.registration.METHODS)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).eval()
with torch.no_grad():
    # without a cache, which for Llama 4 is bfloat16 whatever the model is
    found = {"logits": model(load_file(tokens)["tokens"], use_cache=False).logits.float()}
for name, layer in model.named_modules():
    if isinstance(layer, awq_ext.QuantLinear):
        sizes = (layer.in_features, layer.out_features, layer.group_size, layer.bits)
        found[name] = quant_weight(layer.tiles, layer.tile_scales, layer.tile_zeros, *sizes).float()
save_file(found, result)
