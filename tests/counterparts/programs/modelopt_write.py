"""modelopt_write.py FOLDER WEIGHTS FAMILY: ModelOpt quantizes a tiny model (INT4_AWQ, group size 64) and exports it to FOLDER.

WEIGHTS (safetensors): the exported layers unpacked by its own quantized tensor, fp32 [out, in], without pre_quant_scale.
"""

from __future__ import annotations

import copy
import sys

import modelopt.torch.quantization as mtq
import tiny
import torch
from modelopt.torch.export import export_hf_checkpoint

folder, weights_file, family = sys.argv[1:]
model = tiny.build(family, torch.float32)
config = copy.deepcopy(mtq.INT4_AWQ_CFG)
for entry in config["quant_cfg"]:
    if entry["quantizer_name"] == "*weight_quantizer":
        entry["cfg"]["block_sizes"][-1] = 64


def calibrate(calibrated: torch.nn.Module) -> None:
    for sample in tiny.samples():
        calibrated(torch.tensor([sample]))


mtq.quantize(model, config, calibrate)
with torch.inference_mode():
    export_hf_checkpoint(model, export_dir=folder)
