"""autoawq_write.py FOLDER WEIGHTS FAMILY VERSION GROUP_SIZE: AutoAWQ quantizes a tiny model and saves it in FOLDER.

Its whole way from calibration to ``save_quantized``. WEIGHTS (safetensors): what its layers stand for, fp16 [out, in], as
AutoAWQ computed them: rounded weights handed to its packer and, for GEMM, also what it unpacks again, which must agree.
"""

from __future__ import annotations

import sys
import tempfile

import tiny
import torch
from awq import AutoAWQForCausalLM
from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast
from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import save_file

folder, weights_file, family, version, group_size = sys.argv[1:]

with tempfile.TemporaryDirectory() as float_folder:
    tiny.save_float(family, float_folder)
    model = AutoAWQForCausalLM.from_pretrained(float_folder, device_map="cpu", safetensors=True)

rounded: dict[int, torch.Tensor] = {}
layer_class = {"gemm": WQLinear_GEMM, "gemv": WQLinear_GEMV, "gemv_fast": WQLinear_GEMVFast}[version]
from_linear = layer_class.from_linear.__func__


def remembering(cls, linear, *args, **kwargs):
    layer = from_linear(cls, linear, *args, **kwargs)
    rounded[id(layer)] = linear.weight.data.clone()
    return layer


layer_class.from_linear = classmethod(remembering)
model.quantize(
    tokenizer=None,
    quant_config={"zero_point": True, "q_group_size": int(group_size), "w_bit": 4, "version": version},
    calib_data=tiny.samples(),
    max_calib_samples=8,
    max_calib_seq_len=64,
)
model.save_quantized(folder, shard_size="40KB")

weights = {}
for name, layer in model.model.named_modules():
    if not isinstance(layer, layer_class):
        continue
    weights[name] = rounded[id(layer)]
    if version == "gemm":
        unpacked = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, layer.group_size).t()
        assert torch.equal(unpacked, weights[name]), name
assert len(weights) == 14, sorted(weights)
save_file({name: weight.contiguous() for name, weight in weights.items()}, weights_file)
