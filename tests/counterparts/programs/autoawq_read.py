"""autoawq_read.py FOLDER WEIGHTS [TOKENS LOGITS]: AutoAWQ loads a directory; what its layers stand for is written to WEIGHTS.

The steps of ``AutoAWQForCausalLM.from_quantized`` one by one, because on a CPU that function insists on Intel's
extension for PyTorch, whose last release is for an older torch. WEIGHTS (safetensors): fp16 [out, in], and biases as NAME.bias.
GEMM by AutoAWQ's ``dequantize_gemm``; GEMV, which it has only as a CUDA kernel, by its ``unpack_awq``, and packed again by its
own packer, which must give the tensors of the directory bit for bit.
TOKENS int64 [1, T] -> LOGITS [1, T, V], both safetensors: GEMM only.
"""

from __future__ import annotations

import sys

sys.modules["triton"] = None  # AutoAWQ takes Triton for a GPU; without it its GEMM layer runs anywhere
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from awq.models.llama import LlamaAWQForCausalLM
from awq.models.qwen2 import Qwen2AWQForCausalLM
from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV
from awq.utils.packing_utils import dequantize_gemm, unpack_awq
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

folder, weights_file, *rest = sys.argv[1:]
family = AutoConfig.from_pretrained(folder).model_type
awq_class = {"llama": LlamaAWQForCausalLM, "qwen2": Qwen2AWQForCausalLM}[family]

path, config, quant_config = awq_class._load_config(awq_class, folder, "", True, False)
with init_empty_weights():
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float16)
awq_class._load_quantized_modules(
    awq_class, model, quant_config, quant_config.version, use_exllama=False, use_exllama_v2=False
)
model.tie_weights()
load_checkpoint_and_dispatch(model, checkpoint=path, device_map={"": "cpu"}, dtype=torch.float16)
model.eval()


def gemv_weight(layer: WQLinear_GEMV) -> torch.Tensor:
    codes, zeros = (tensor & 15 for tensor in unpack_awq(layer.qweight, layer.qzeros, 4))
    groups = layer.in_features // layer.group_size
    scales, zeros = layer.scales[:, :groups].contiguous(), zeros[:, :groups].contiguous()
    spread = [tensor.repeat_interleave(layer.group_size, 1) for tensor in (zeros, scales)]
    weight = (codes - spread[0]) * spread[1]
    linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=torch.float16)
    linear.weight.data = weight
    if layer.bias is not None:
        linear.bias.data = layer.bias
    again = WQLinear_GEMV.from_linear(linear, 4, layer.group_size, scales=scales, zeros=zeros.half())
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    return weight


weights = {}
for name, layer in model.named_modules():
    if isinstance(layer, WQLinear_GEMM):
        weights[name] = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, layer.group_size).t().contiguous()
    elif isinstance(layer, WQLinear_GEMV):
        weights[name] = gemv_weight(layer)
    if name in weights and layer.bias is not None:
        weights[f"{name}.bias"] = layer.bias
assert weights
save_file(weights, weights_file)
if rest:
    with torch.no_grad():
        save_file({"logits": model(load_file(rest[0])["tokens"]).logits}, rest[1])
