"""gptqmodel_write.py OUT SETTINGS...: GPTQModel quantizes a tiny Llama and saves it, once for each of SETTINGS.

SETTINGS: fields of its QuantizeConfig as JSON. OUT/0, OUT/1, ...: the directories. OUT/0.safetensors, ...: NAME = the weight of a
layer as GPTQModel dequantizes it when it has loaded the directory again, float32 [out, in]; NAME.zeros, those it was packed with;
tokens int64 [1, 64], and their logits, float32. Some rows of k_proj are nowhere negative, so that some zeros are 0.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # on a machine of two processors it takes 1, and fails as its loader wants 2
import tiny
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.utils import model as packing
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

out, *wanted = sys.argv[1:]
os.chdir(out)  # it writes logs to wherever it is
samples = [{"input_ids": sample, "attention_mask": [1] * len(sample)} for sample in tiny.samples()]
tokens = torch.tensor([samples[0]["input_ids"]])
words = Tokenizer(models.WordLevel({str(i): i for i in range(tiny.SIZES["vocab_size"])}, unk_token="0"))
zeros: dict[str, torch.Tensor] = {}
pack = packing.pack_module


def remembering(**said):
    zeros[f"{said['name']}.zeros"] = said["q_zeros"].int().contiguous()
    return pack(**said)


packing.pack_module = remembering


def written(folder: str, float_folder: str, settings: dict) -> dict[str, torch.Tensor]:
    """Quantize, save, load again."""
    model = GPTQModel.load(float_folder, QuantizeConfig(**settings, device="cpu"))
    model.quantize(samples, batch_size=1, backend=BACKEND.GPTQ_TORCH)
    model.save(folder)
    again = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    layers = {name: layer for name, layer in again.named_modules() if hasattr(layer, "dequantize_weight")}
    assert len(layers) == 14, sorted(layers)
    found = {name: layer.dequantize_weight().T.float().contiguous() for name, layer in layers.items()}
    with torch.no_grad():
        return found | {"tokens": tokens, "logits": again(tokens).logits.float()}


with tempfile.TemporaryDirectory() as float_folder:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[::3].abs_()
    model.save_pretrained(float_folder)
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1").save_pretrained(float_folder)
    for index, text in enumerate(wanted):
        zeros.clear()
        tensors = written(f"{out}/{index}", float_folder, json.loads(text))
        save_file(tensors | zeros, Path(out) / f"{index}.safetensors")
