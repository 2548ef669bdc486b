"""gptqmodel_logits.py FOLDER PROMPT TENSORS: GPTQModel itself loads a "gptq" directory and computes the logits of a prompt.

PROMPT safetensors: tokens int64 [1, T]. TENSORS safetensors: logits fp32 [1, T, V]. The output layer must be one of its own.
"""

from __future__ import annotations

import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file, save_file

folder, prompt, out = sys.argv[1:]
tokens = load_file(prompt)["tokens"]
model = GPTQModel.load(
    folder, device="cpu", backend=BACKEND.GPTQ_TORCH if hasattr(BACKEND, "GPTQ_TORCH") else BACKEND.TORCH
)
head = model.model.lm_head
assert type(head).__module__.startswith("gptqmodel"), type(head)
with torch.no_grad():
    save_file({"logits": model.model(tokens).logits.float()}, out)
