"""NVIDIA ModelOpt's unified Hugging Face checkpoint, W4A16_AWQ: what TensorRT-LLM reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layout import FLOATS, Layout, Summary
from .packed import SYMMETRIC_ZERO, CheckpointError, PackedLinear, expect, pack_rows
from .settings import Settings, anything, checked_group_size, int_setting, one_of, require_known

QUANT_FILE = "hf_quant_config.json"
# TensorRT-LLM joins these into one product: their input scale is not read, while every other layer must have one.
JOINED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")

_KNOWN = {
    **dict.fromkeys(("quant_method", "quant_algo", "group_size", "ignore", "exclude_modules", "producer"), anything),
    "has_zero_point": one_of(False),
    "pre_quant_scale": anything,  # a layer has the tensor, or not
}


class ModelOpt(Layout):
    """weight uint8 [N/2, K] (output 2j in the low nibble, two's complement), weight_scale fp32 [N, K/g], pre_quant_scale [K]."""

    name = "modelopt"
    rows_at = ("weight_scale", 0)
    suffixes = ("weight", "weight_scale")
    optional = ("pre_quant_scale", "bias")
    scale_dtypes = (torch.float16, torch.bfloat16, torch.float32)
    run_time_scales = True
    divisors = (2, 1)

    def problems(self, name: str, layer: PackedLinear) -> list[str]:
        found = super().problems(name, layer)
        if not layer.symmetric:
            found.append("it has zero points, which this format lacks: quantize with symmetric=True")
        if layer.pre_quant_scale is not None and name.rpartition(".")[2] in JOINED:
            found.append(
                "its input is scaled at run time, which TensorRT-LLM does not read for layers it joins "
                f'({", ".join(JOINED)}): quantize with fold="always"'
            )
        return found

    def model_problems(self, summary: Summary) -> list[str]:
        found = super().model_problems(summary)
        if summary.group_sizes() == [-1]:
            found.append(
                "every row is one group (group_size=-1), and ModelOpt and TensorRT-LLM divide rows by a positive number: quantize "
                "with group_size=128 or 64"
            )
        return found

    def pack(self, layer: PackedLinear, summary: Summary | None = None) -> dict[str, Tensor]:
        signed = layer.codes() ^ SYMMETRIC_ZERO  # code - 8 in two's complement
        tensors = {"weight": signed[::2] | signed[1::2] << 4, "weight_scale": layer.scales.float()}
        scale = layer.pre_quant_scale
        tensors["pre_quant_scale"] = torch.ones(layer.in_features) if scale is None else scale
        return tensors if layer.bias is None else tensors | {"bias": layer.bias}

    def unpack(self, tensors: Mapping[str, Tensor], settings: Settings) -> PackedLinear:
        self.require(tensors)
        weight, scales, scale = tensors["weight"], tensors["weight_scale"], tensors.get("pre_quant_scale")
        if weight.dim() != 2 or scales.dim() != 2:
            raise CheckpointError(
                f"weight and weight_scale have shapes {tuple(weight.shape)} and {tuple(scales.shape)}"
            )
        n, k, groups = weight.shape[0] * 2, weight.shape[1], scales.shape[1]
        expect("weight", weight, (n // 2, k), (torch.uint8, torch.int8))
        expect("weight_scale", scales, (n, groups), FLOATS)
        if groups == 0 or k % groups:
            raise CheckpointError(f"weight_scale has {groups} groups for {k} channels, which they do not divide")
        if scale is not None:
            expect("pre_quant_scale", scale, (k,), FLOATS)
            scale = None if bool((scale == 1).all()) else scale.float()
        bytes_ = weight.view(torch.uint8)
        codes = torch.stack((bytes_ & 15, bytes_ >> 4), dim=1).reshape(n, k) ^ SYMMETRIC_ZERO
        zeros = torch.full((n, groups), SYMMETRIC_ZERO, dtype=torch.uint8)
        size = settings.group_size(k, groups) if settings.group_sizes else k // groups
        bias = self.bias_of(tensors, n)
        return PackedLinear(pack_rows(codes), scales.contiguous(), zeros, k, size, bias, scale)

    def quantization_config(self, summary: Summary) -> dict[str, Any]:
        return {
            "quant_method": "modelopt",
            "quant_algo": "W4A16_AWQ",
            "group_size": summary.group_sizes()[0],
            "ignore": list(summary.float_linears),
            "producer": {"name": "modelopt", "version": "awq_ext"},
        }

    def files(self, summary: Summary) -> dict[str, dict[str, Any]]:
        quantization = {
            "quant_algo": "W4A16_AWQ",
            "kv_cache_quant_algo": None,
            "group_size": summary.group_sizes()[0],
            "has_zero_point": False,
            "pre_quant_scale": True,
            "exclude_modules": list(summary.float_linears),
        }
        return {QUANT_FILE: {"producer": {"name": "modelopt", "version": "awq_ext"}, "quantization": quantization}}

    def reads(self, config: Mapping[str, Any]) -> Settings | None:
        if isinstance(inner := config.get("quantization"), dict):  # hf_quant_config.json
            config = {"quant_method": "modelopt", **inner}
        if config.get("quant_method") != "modelopt":
            return None
        if (algorithm := config.get("quant_algo")) != "W4A16_AWQ":
            raise CheckpointError(
                f"quantization_config: quant_algo={algorithm!r}; of ModelOpt's, W4A16_AWQ can be read"
            )
        require_known(config, _KNOWN)
        size = int_setting(config, "group_size")
        return Settings(() if size is None else (checked_group_size(size),))

    def claims(self, leaves: Mapping[str, torch.dtype]) -> bool:
        return leaves.get("weight") in (torch.uint8, torch.int8) and "weight_scale" in leaves
