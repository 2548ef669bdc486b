"""llama_cpp_logits.py FOLDER: the logits that llama.cpp computes with each NAME.gguf in FOLDER, keys and values in float32.

NAME.safetensors beside it: tokens int64 [1, T], and context int64 [], for how many tokens room is made. Written beside it:
NAME.out.safetensors: logits fp32 [1, T, V].
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from llama_cpp import Llama
from safetensors.torch import load_file, save_file

FLOAT32 = 0  # of ggml's types
for file in sorted(Path(sys.argv[1]).glob("*.gguf")):
    given = load_file(file.with_suffix(".safetensors"))
    tokens = given["tokens"][0].tolist()
    settings = {"n_threads": 1, "logits_all": True, "verbose": False, "type_k": FLOAT32, "type_v": FLOAT32}
    model = Llama(str(file), n_ctx=int(given["context"]), **settings)
    model.eval(tokens)
    logits = torch.from_numpy(model.scores[: len(tokens)].copy())[None].float()
    save_file({"logits": logits}, file.with_suffix(".out.safetensors"))
    model.close()
