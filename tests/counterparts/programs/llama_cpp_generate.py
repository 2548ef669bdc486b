"""llama_cpp_generate.py FILE PROMPT TENSORS: llama.cpp loads a GGUF file and continues a prompt of token numbers.

PROMPT safetensors: tokens int64 [1, T]. TENSORS safetensors: generated int64 [1, T + 16], greedily; logits fp32 [1, T, V] of the
prompt; text int64 [1, S]: llama.cpp's own tokens of the text in the environment variable TEXT, if there is one.
"""

from __future__ import annotations

import os
import sys

import torch
from llama_cpp import Llama
from safetensors.torch import load_file, save_file

file, prompt, out = sys.argv[1:]
tokens = load_file(prompt)["tokens"][0].tolist()
model = Llama(file, n_ctx=len(tokens) + 32, n_threads=1, logits_all=True, verbose=False)
model.eval(tokens)
logits = torch.from_numpy(model.scores[: len(tokens)].copy())
found = {"logits": logits[None].float()}
generated = list(tokens)
for _ in range(16):
    generated.append(int(model.scores[len(generated) - 1].argmax()))
    model.eval(generated[-1:])
found["generated"] = torch.tensor([generated])
if text := os.environ.get("TEXT"):
    found["text"] = torch.tensor([model.tokenize(text.encode(), add_bos=False)])
save_file(found, out)
