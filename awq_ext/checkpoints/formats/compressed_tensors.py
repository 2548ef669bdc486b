"""compressed-tensors "pack-quantized" W4A16: what llm-compressor writes and vLLM reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layout import FLOATS, Layout, Settings, Summary, checked_group_size, int_setting, require_bits
from .packed import SYMMETRIC_ZERO, CheckpointError, PackedLinear, expect
from .words import pack_words, rows_of, unpack_words, words_of


class CompressedTensors(Layout):
    """weight_packed int32 [N, ceil(K/8)], weight_scale [N, G], weight_shape int64 [2]; weight_zero_point int32 [ceil(N/8), G].

    Codes and zeros are stored as they are (the library takes them for signed values plus 8); zeros are packed along N, and
    absent where all are 8.
    """

    name = "compressed-tensors"
    rows_at = ("weight_scale", 0)
    suffixes = ("weight_packed", "weight_scale", "weight_shape")
    optional = ("weight_zero_point", "weight_g_idx", "bias")
    scale_dtypes = (torch.float16, torch.bfloat16, torch.float32)
    mixes_group_sizes = True

    def pack(self, layer: PackedLinear, summary: Summary | None = None) -> dict[str, Tensor]:
        n, k = layer.out_features, layer.in_features
        tensors = {
            "weight_packed": words_of(layer.qweight),
            "weight_scale": layer.scales,
            "weight_shape": torch.tensor([n, k]),
        }
        if not (summary or layer).symmetric:
            tensors["weight_zero_point"] = pack_words(layer.zeros.T).T.contiguous()
        return tensors if layer.bias is None else tensors | {"bias": layer.bias}

    def unpack(self, tensors: Mapping[str, Tensor], settings: Settings) -> PackedLinear:
        self.require(tensors)
        shape, scales, packed = tensors["weight_shape"], tensors["weight_scale"], tensors["weight_packed"]
        expect("weight_shape", shape, (2,), (torch.int64, torch.int32))
        n, k = shape.tolist()
        if n < 1 or k < 1 or scales.dim() != 2:
            raise CheckpointError(f"weight_shape is {[n, k]}, weight_scale has shape {tuple(scales.shape)}")
        groups = scales.shape[1]
        expect("weight_packed", packed, (n, -(-k // 8)), (torch.int32,))
        expect("weight_scale", scales, (n, groups), FLOATS)
        size = settings.group_size(k, groups)
        if (order := tensors.get("weight_g_idx")) is not None:
            expect("weight_g_idx", order, (k,), (torch.int32, torch.int64))
            if not torch.equal(order.long(), torch.arange(k) // (k if size == -1 else size)):
                raise CheckpointError("weight_g_idx reorders the channels (actorder=group), which awq_ext does not run")
        if (zeros := tensors.get("weight_zero_point")) is None:
            zeros = torch.full((n, groups), SYMMETRIC_ZERO, dtype=torch.uint8)
        else:
            expect("weight_zero_point", zeros, (-(-n // 8), groups), (torch.int32,))
            zeros = unpack_words(zeros.T, n).T.contiguous()
        return PackedLinear(rows_of(packed, k), scales.contiguous(), zeros, k, size, self.bias_of(tensors, n))

    def quantization_config(self, summary: Summary) -> dict[str, Any]:
        schemes: dict[int, list[str]] = {}
        for name, facts in summary.layers.items():
            schemes.setdefault(-1 if facts.groups == 1 else facts.group_size, []).append(name)
        groups = {}
        for index, (size, names) in enumerate(schemes.items()):
            weights = {
                "num_bits": 4,
                "type": "int",
                "symmetric": summary.symmetric,
                "strategy": "channel" if size == -1 else "group",
                "group_size": None if size == -1 else size,
                "dynamic": False,
                "actorder": None,
            }
            groups[f"group_{index}"] = {
                "targets": ["Linear"] if len(schemes) == 1 else names,
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "config_groups": groups,
            "ignore": list(summary.float_linears),
        }

    def reads(self, config: Mapping[str, Any]) -> Settings | None:
        if config.get("quant_method") != "compressed-tensors":
            return None
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()) or not groups:
            raise CheckpointError("quantization_config: config_groups is missing or damaged")
        formats = {config.get("format"), *(group.get("format") for group in groups.values())} - {None}
        if formats != {"pack-quantized"}:
            raise CheckpointError(
                f"quantization_config: format {sorted(map(str, formats))}; pack-quantized can be read"
            )
        return Settings(tuple(dict.fromkeys(_group_size(group) for group in groups.values())))


def _group_size(group: Mapping[str, Any]) -> int:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise CheckpointError("quantization_config: a group of config_groups has no weights")
    require_bits(weights, "num_bits")
    if weights.get("type", "int") != "int" or group.get("input_activations") is not None:
        raise CheckpointError("quantization_config: only int4 weights with float activations can be read")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        raise CheckpointError(f"quantization_config: strategy={strategy!r}; group and channel can be read")
    return -1 if strategy == "channel" else checked_group_size(int_setting(weights, "group_size"))
