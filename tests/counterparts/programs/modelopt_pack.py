"""modelopt_pack.py FOLDER WEIGHTS ...: ModelOpt's packer, given what the layers of FOLDERs stand for, makes their bytes.

WEIGHTS (safetensors): fp32 [out, in] by layer. What ModelOpt derives from hf_quant_config.json for config.json must be in it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import pack_int4_in_uint8
from safetensors.torch import load_file


def check(folder: Path, weights_file: str) -> None:
    config = json.loads((folder / "hf_quant_config.json").read_text())
    group_size = config["quantization"]["group_size"]
    tensors = load_file(folder / "model.safetensors")
    weights = load_file(weights_file)
    assert weights
    for name, weight in weights.items():
        packed = pack_int4_in_uint8(weight, tensors[f"{name}.weight_scale"], group_size)
        assert packed.dtype == tensors[f"{name}.weight"].dtype and torch.equal(packed, tensors[f"{name}.weight"]), name
    converted = convert_hf_quant_config_format(config)
    in_config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for key, value in converted.items():  # what ModelOpt itself writes into config.json
        assert in_config[key] == value, (key, value, in_config)


for folder, weights_file in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    check(Path(folder), weights_file)
