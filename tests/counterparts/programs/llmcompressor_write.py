"""llmcompressor_write.py FOLDER WEIGHTS FAMILY KIND: llm-compressor quantizes a tiny model in groups of 64 and saves it in FOLDER.

KIND: symmetric (plain rounding), asymmetric (its AWQ modifier, calibrated) or w8a8 (its scheme of that name: plain rounding of
whole rows to 8 bits, activations rounded while the model runs). WEIGHTS (safetensors): what the layers of FOLDER
stand for, [out, in] in their scales' dtype, as compressed-tensors decompresses them.
"""

from __future__ import annotations

import sys
import tempfile

import tiny
import torch
from compressed_tensors_read import decompressed
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

folder, weights_file, family, kind = sys.argv[1:]
torch.Tensor.pin_memory = lambda tensor, *_: tensor  # the AWQ modifier pins memory, which needs an accelerator

arguments = {"num_bits": 4, "type": "int", "symmetric": kind == "symmetric", "strategy": "group", "group_size": 64}
group = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}}}
chosen = ({"scheme": "W8A8", "targets": ["Linear"]} if kind == "w8a8" else group) | {"ignore": ["lm_head"]}
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

weights = decompressed(folder)
assert len(weights) == 14, sorted(weights)
save_file(weights, weights_file)
