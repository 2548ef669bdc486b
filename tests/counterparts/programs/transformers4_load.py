"""transformers4_load.py FOLDER WEIGHTS AGAIN: Transformers 4 loads an "awq" directory through awq_ext.register_with_transformers.

Its layers must be what WEIGHTS (safetensors, fp16 [out, in]) says; its own save_pretrained refuses (and prints why), ours writes to
AGAIN, from where it loads once more.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import awq_ext

folder, weights_file, again = sys.argv[1:]
awq_ext.register_with_transformers()
prompt = torch.arange(5)[None]


def check(folder: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float16)
    for name, weight in load_file(weights_file).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, awq_ext.QuantLinear), type(layer)
        assert torch.equal(layer.weight, weight), name
    generated = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    try:
        model.save_pretrained(again)
    except ValueError as error:
        print(error)
    awq_ext.save_pretrained(model, again, overwrite=True)
    return generated


assert torch.equal(check(folder), check(again))
