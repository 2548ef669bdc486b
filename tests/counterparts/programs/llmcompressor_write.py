"""llmcompressor_write.py FOLDER WEIGHTS FAMILY KIND: llm-compressor quantizes a tiny model and saves it in FOLDER.

KIND: symmetric (plain rounding) or asymmetric (its AWQ modifier, calibrated), both 4 bits in groups of 64; rows of 8 bits, zeros of
8 bits (in groups of 32); or a scheme of its own, W8A16 or W8A8, which rounds activations while the model runs.
WEIGHTS (safetensors): what the layers of FOLDER stand for, [out, in] in their scales' dtype, as compressed-tensors decompresses
them; tokens int64 [1, 64], and the logits of that model in float32 (not of W8A8).
"""

from __future__ import annotations

import sys
import tempfile

import tiny
import torch
from compressed_tensors_read import decompressed_model
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

folder, weights_file, family, kind = sys.argv[1:]
torch.Tensor.pin_memory = lambda tensor, *_: tensor  # the AWQ modifier pins memory, which needs an accelerator
WEIGHTS = {
    "symmetric": {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64},
    "asymmetric": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 64},
    "rows of 8 bits": {"num_bits": 8, "symmetric": True, "strategy": "channel"},
    "zeros of 8 bits": {"num_bits": 8, "symmetric": False, "strategy": "group", "group_size": 32},
}
chosen = {"ignore": ["lm_head"]}
if kind in WEIGHTS:
    chosen["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS[kind] | {"type": "int"}}}
else:
    chosen |= {"scheme": kind, "targets": ["Linear"]}
with tempfile.TemporaryDirectory() as float_folder:
    tiny.save_float(family, float_folder)
    model = AutoModelForCausalLM.from_pretrained(float_folder, dtype=torch.float16)
    if kind != "asymmetric":
        oneshot(model=model, recipe=QuantizationModifier(**chosen))
    else:
        words = Tokenizer(models.WordLevel({str(i): i for i in range(tiny.SIZES["vocab_size"])}, unk_token="0"))
        oneshot(
            model=model,
            dataset=Dataset.from_dict({"input_ids": tiny.samples(), "attention_mask": [[1] * 64] * 8}),
            processor=PreTrainedTokenizerFast(tokenizer_object=words),  # asked for; the samples are tokens already
            recipe=AWQModifier(**chosen),
            max_seq_length=64,
            num_calibration_samples=8,
        )
    model.save_pretrained(folder, save_compressed=True, max_shard_size="60KB")

model, weights = decompressed_model(folder)
assert len(weights) == 14, sorted(weights)
tokens = torch.tensor([tiny.samples()[0]])
if kind != "W8A8":
    with torch.no_grad():
        weights = weights | {"tokens": tokens, "logits": torch.nn.Module.float(model)(tokens).logits}
save_file(weights, weights_file)
