"""llmcompressor_write.py FOLDER WEIGHTS FAMILY KIND: llm-compressor quantizes a tiny model and saves it in FOLDER.

KIND: symmetric (plain rounding), asymmetric (its AWQ modifier, calibrated), both 4 bits in groups of 64; w8a8, w8a16 (its schemes
of these names: plain rounding of whole rows to 8 bits, activations of W8A8 rounded while the model runs); w8a16-128 and
w8a16-32-zeros (groups of 128 and 32, the latter with zero points). WEIGHTS (safetensors): what the layers of FOLDER stand for,
[out, in] in their scales' dtype, as compressed-tensors decompresses them; tokens int64 [1, 64], and the logits of that model in
float32 (not of w8a8).
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


def scheme() -> dict:
    """Arguments of a modifier."""
    if kind in ("w8a8", "w8a16"):
        return {"scheme": kind.upper(), "targets": ["Linear"], "ignore": ["lm_head"]}
    _, size, zeros = (*kind.split("-"), "", "")[:3]
    symmetric = kind == "symmetric" or (size != "" and not zeros)
    weights = {"num_bits": 8 if size else 4, "type": "int", "symmetric": symmetric, "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | {"group_size": int(size or 64)}}}
    return {"config_groups": groups, "ignore": ["lm_head"]}


chosen = scheme()
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
if kind != "w8a8":
    with torch.no_grad():
        weights = weights | {"tokens": tokens, "logits": model.float()(tokens).logits}
save_file(weights, weights_file)
