"""gptqmodel_generate.py FOLDER PROMPT TENSORS: Transformers loads a directory through gptqmodel and continues a prompt.

PROMPT safetensors: tokens int64 [1, T]. TENSORS safetensors: generated int64 [1, T + 16], greedily; logits fp32 [1, T, V] of the
prompt; kernel: the class of the layers, as the file's metadata.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, prompt, out = sys.argv[1:]
tokens = load_file(prompt)["tokens"]
model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
kernels = {f"{type(m).__module__}.{type(m).__name__}" for m in model.modules()}
kernels = {kernel for kernel in kernels if kernel.startswith("gptqmodel")}
with torch.no_grad():
    logits = model(tokens).logits.float()
generated = model.generate(tokens, max_new_tokens=16, do_sample=False, pad_token_id=0)
save_file({"generated": generated, "logits": logits}, out, metadata={"kernel": " ".join(sorted(kernels))})
