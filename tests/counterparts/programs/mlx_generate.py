"""mlx_generate.py DIRECTORY PROMPT TENSORS: mlx-lm loads a directory and continues a prompt of token numbers.

PROMPT safetensors: tokens int64 [1, T]. TENSORS safetensors: generated int64 [1, T + 16], greedily; logits fp32 [1, T, V] of the
prompt. Prints which kind each quantized module has: the sizes of groups and bits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

folder, prompt, out = sys.argv[1:]
mx.set_default_device(mx.cpu)
tokens = mx.load(prompt)["tokens"]
model, _ = load_model(Path(folder))
for name, module in model.named_modules():
    if hasattr(module, "bits"):
        print(name, type(module).__name__, module.group_size, module.bits)
cache = make_prompt_cache(model)
logits = model(tokens, cache=cache)
found = {"logits": logits.astype(mx.float32)}
generated = tokens.tolist()[0]
for _ in range(16):
    generated.append(int(logits[0, -1].argmax()))
    logits = model(mx.array([generated[-1:]]), cache=cache)
found["generated"] = mx.array([generated], dtype=mx.int64)
mx.save_safetensors(out, found)
