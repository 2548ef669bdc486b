"""autoawq_read.py [--logits TOKENS LOGITS] FOLDER WEIGHTS ...: AutoAWQ loads directories; WEIGHTS get what their layers stand for.

The steps of ``AutoAWQForCausalLM.from_quantized`` one by one, because on a CPU that function insists on Intel's
extension for PyTorch, whose last release is for an older torch. WEIGHTS (safetensors): fp16 [out, in], and biases as NAME.bias.
GEMM by AutoAWQ's ``dequantize_gemm``. GEMV and GEMVFast, which it dequantizes in CUDA kernels alone, by its ``unpack_awq``, or
where its packer puts each code; and packed again by its own packer, which must give the tensors of the directory bit for bit.
TOKENS int64 [1, T] -> LOGITS [1, T, V], both safetensors: of a single directory, GEMM only.
"""

from __future__ import annotations

import sys

sys.modules["triton"] = None  # AutoAWQ takes Triton for a GPU; without it its GEMM layer runs anywhere
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from awq.models.llama import LlamaAWQForCausalLM
from awq.models.qwen2 import Qwen2AWQForCausalLM
from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast
from awq.modules.linear.gemv_fast import pack_intweight
from awq.utils.packing_utils import dequantize_gemm, unpack_awq
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

CLASSES = {"llama": LlamaAWQForCausalLM, "qwen2": Qwen2AWQForCausalLM}


def loaded(folder: str) -> torch.nn.Module:
    awq_class = CLASSES[AutoConfig.from_pretrained(folder).model_type]
    path, config, quant_config = awq_class._load_config(awq_class, folder, "", True, False)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float16)
    awq_class._load_quantized_modules(
        awq_class, model, quant_config, quant_config.version, use_exllama=False, use_exllama_v2=False
    )
    model.tie_weights()
    load_checkpoint_and_dispatch(model, checkpoint=path, device_map={"": "cpu"}, dtype=torch.float16)
    return model.eval()


def gemv_parts(layer: WQLinear_GEMV) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in], zeros and scales [out, groups]."""
    codes, zeros = (tensor & 15 for tensor in unpack_awq(layer.qweight, layer.qzeros, 4))
    groups = layer.in_features // layer.group_size
    return codes, zeros[:, :groups], layer.scales[:, :groups].contiguous()


def nibbles(words: torch.Tensor) -> torch.Tensor:
    return torch.stack([words.int() >> 4 * i & 15 for i in range(4)], -1).flatten()


def fast_parts(layer: WQLinear_GEMVFast) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same. Where a code went is told by packing the digits of its number, in base 16."""
    shape = (layer.out_features, layer.in_features)
    numbers = torch.arange(shape[0] * shape[1]).view(shape)
    came_from = sum(nibbles(pack_intweight(numbers >> 4 * d & 15, 4, 64)).long() << 4 * d for d in range(5))
    codes = torch.zeros(shape, dtype=torch.int32).flatten()
    codes[came_from] = nibbles(layer.qweight)
    groups = layer.in_features // layer.group_size
    scales, products = (tensor[:groups].T.contiguous() for tensor in (layer.scales, layer.qzeros))
    return codes.view(shape), (-products.float() / scales).round().int(), scales


def weight_of(layer: torch.nn.Module) -> torch.Tensor:
    codes, zeros, scales = (gemv_parts if isinstance(layer, WQLinear_GEMV) else fast_parts)(layer)
    spread = [tensor.repeat_interleave(layer.group_size, 1) for tensor in (zeros, scales)]
    linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=torch.float16)
    linear.weight.data = (codes - spread[0]) * spread[1]
    if layer.bias is not None:
        linear.bias.data = layer.bias
    again = type(layer).from_linear(linear, 4, layer.group_size, scales=scales, zeros=zeros.half())
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    return linear.weight.data


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, WQLinear_GEMM):
            found = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, layer.group_size)
            weights[name] = found.t().contiguous()
        elif isinstance(layer, (WQLinear_GEMV, WQLinear_GEMVFast)):
            weights[name] = weight_of(layer)
        if name in weights and layer.bias is not None:
            weights[f"{name}.bias"] = layer.bias
    assert weights
    return weights


folders, tokens_file, logits_file = sys.argv[1:], "", ""
if folders[0] == "--logits":
    _, tokens_file, logits_file, *folders = folders
for folder, weights_file in zip(folders[::2], folders[1::2], strict=True):
    model = loaded(folder)
    save_file(weights_of(model), weights_file)
    if logits_file:
        with torch.no_grad():
            save_file({"logits": model(load_file(tokens_file)["tokens"]).logits}, logits_file)
