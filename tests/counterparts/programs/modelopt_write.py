"""modelopt_write.py FOLDER OUT FAMILY: ModelOpt quantizes a tiny model (INT4_AWQ, groups of 64) and exports it to FOLDER.

OUT (safetensors): NAME = the weight a layer stands for, fp32 [out, in], before its input's pre_quant_scale: what ModelOpt's
packer was given, rounded by its own rule; tokens int64 [1, 64]; logits fp32 [1, 64, V] of its simulated quantized model, once the
exporter has given layers with one input one input scale.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import tiny
import torch
from modelopt.torch.export import export_hf_checkpoint, quant_utils, unified_export_hf
from safetensors.torch import load_file, save_file

folder, out, family = sys.argv[1:]
model = tiny.build(family, torch.float32)
config = copy.deepcopy(mtq.INT4_AWQ_CFG)
for entry in config["quant_cfg"]:
    if entry["quantizer_name"] == "*weight_quantizer":
        entry["cfg"]["block_sizes"][-1] = 64


def calibrate(calibrated: torch.nn.Module) -> None:
    for sample in tiny.samples():
        calibrated(torch.tensor([sample]))


packed: list[tuple[torch.Tensor, torch.Tensor]] = []
pack = quant_utils.pack_int4_in_uint8


def remembering(weight: torch.Tensor, scale: torch.Tensor, block_size: int) -> torch.Tensor:
    spread = scale.repeat_interleave(block_size, -1)
    result = pack(weight, scale, block_size)
    packed.append((result, (weight / spread).round().clamp(-8, 7) * spread))
    return result


quant_utils.pack_int4_in_uint8 = remembering
tokens = torch.tensor([tiny.samples()[0]])
logits: list[torch.Tensor] = []
resmooth = unified_export_hf.requantize_resmooth_fused_llm_layers


def measured(model: torch.nn.Module) -> None:
    resmooth(model)
    logits.append(model(tokens).logits.clone())


unified_export_hf.requantize_resmooth_fused_llm_layers = measured
mtq.quantize(model, config, calibrate)
with torch.inference_mode():
    export_hf_checkpoint(model, export_dir=folder)

written = {}
for name, tensor in load_file(Path(folder) / "model.safetensors").items():
    if tensor.dtype == torch.uint8:
        matching = [weight for result, weight in packed if torch.equal(result, tensor)]
        assert len(matching) == 1, name
        written[name.removesuffix(".weight")] = matching[0].float().contiguous()
assert len(written) == 14, sorted(written)
save_file(written | {"tokens": tokens, "logits": logits[0]}, out)
