"""Lay out layers as compressed-tensors: packed words (W4A16 and W8A16), and plain integers (W8A8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layout import FLOATS, Layout, Summary
from ..packed import CheckpointError, PackedLinear, expect, middle_code
from ..settings import Settings
from ..words import pack_words, rows_of, unpack_words, words_of
from .config import INTEGERS, METHOD, MIXED, PACKED, TOKENS, WIDTHS, read, with_integers

_PACKED = ("weight_packed", "weight_scale", "weight_shape")
_INTEGERS = ("weight", "weight_scale")
_SIGN = 128  # turns codes into signed values and back


class CompressedTensors(Layout):
    """weight_packed int32 [N, ceil(K/P)], weight_scale [N, G], weight_shape int64 [2]; weight_zero_point int32 [ceil(N/P), G].

    P is 32 / bits. Codes and zeros are stored as they are (the library takes them for signed values plus 8, or 128); zeros are
    packed along N, and absent where all are that.
    """

    name = "compressed-tensors"
    rows_at = ("weight_scale", 0)
    suffixes = _PACKED
    optional = ("weight_zero_point", "weight_g_idx", "bias")
    scale_dtypes = (torch.float16, torch.bfloat16, torch.float32)
    widths = WIDTHS
    mixes_group_sizes = True
    quantized_heads = True

    def pack(self, layer: PackedLinear, summary: Summary | None = None) -> dict[str, Tensor]:
        n, k = layer.out_features, layer.in_features
        tensors = {
            "weight_packed": words_of(layer.qweight),
            "weight_scale": layer.scales,
            "weight_shape": torch.tensor([n, k]),
        }
        if not (summary or layer).symmetric:
            tensors["weight_zero_point"] = pack_words(layer.zeros.T, layer.bits).T.contiguous()
        return tensors if layer.bias is None else tensors | {"bias": layer.bias}

    def unpack(self, tensors: Mapping[str, Tensor], settings: Settings) -> PackedLinear:
        self.require(tensors, _PACKED)
        shape, scales, packed = tensors["weight_shape"], tensors["weight_scale"], tensors["weight_packed"]
        expect("weight_shape", shape, (2,), (torch.int64, torch.int32))
        n, k = shape.tolist()
        if n < 1 or k < 1 or scales.dim() != 2:
            raise CheckpointError(f"weight_shape is {[n, k]}, weight_scale has shape {tuple(scales.shape)}")
        groups, bits = scales.shape[1], settings.width
        expect("weight_packed", packed, (n, -(-k * bits // 32)), (torch.int32,))
        expect("weight_scale", scales, (n, groups), FLOATS)
        size = settings.group_size(k, groups)
        if (order := tensors.get("weight_g_idx")) is not None:
            expect("weight_g_idx", order, (k,), (torch.int32, torch.int64))
            if not torch.equal(order.long(), torch.arange(k) // (k if size == -1 else size)):
                raise CheckpointError("weight_g_idx reorders the channels (actorder=group), which awq_ext does not run")
        if (zeros := tensors.get("weight_zero_point")) is None:
            zeros = torch.full((n, groups), middle_code(bits), dtype=torch.uint8)
        else:
            expect("weight_zero_point", zeros, (-(-n * bits // 32), groups), (torch.int32,))
            zeros = unpack_words(zeros.T, n, bits).T.contiguous()
        rows, bias = rows_of(packed, k, bits), self.bias_of(tensors, n)
        return PackedLinear(rows, scales.contiguous(), zeros, k, size, bias, bits=bits)

    def quantization_config(self, summary: Summary) -> dict[str, Any]:
        schemes: dict[tuple[int, int], list[str]] = {}
        for name, facts in summary.layers.items():
            size = -1 if facts.groups == 1 else facts.group_size
            schemes.setdefault((size, facts.bits), []).append(name)
        groups = {}
        for index, ((size, bits), names) in enumerate(schemes.items()):
            weights = {
                "num_bits": bits,
                "type": "int",
                "symmetric": summary.symmetric,
                "strategy": "channel" if size == -1 else "group",
                "group_size": None if size == -1 else size,
                "dynamic": False,
                "actorder": None,
            }
            groups[f"group_{index}"] = {
                # vLLM's output layer is of another class than Linear, and found by its name alone
                "targets": ["Linear", *summary.called(summary.heads)] if len(schemes) == 1 else summary.called(names),
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": METHOD,
            "format": PACKED,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "config_groups": groups,
            "ignore": summary.called(summary.float_linears),
        }

    def reads(self, config: Mapping[str, Any]) -> Settings | None:
        return None if config.get("quant_method") != METHOD or with_integers(config) else read(config)


class CompressedTensorsW8A8(CompressedTensors):
    """The same, but layers of 8 bits are W8A8: weight int8 [N, K], code - 128, and weight_scale [N, 1].

    Readers round the activations of these layers to 8 bits, each row (token) by its own range. vLLM has CPU kernels for that, and
    none for packed words of 8 bits. Other tools may store several groups, [N, G], and weight_zero_point int8 [N, G].
    """

    name = "compressed-tensors-w8a8"
    suffixes = ("weight_scale",)
    optional = ("weight_packed", "weight_shape", "weight", *CompressedTensors.optional)

    def pack(self, layer: PackedLinear, summary: Summary | None = None) -> dict[str, Tensor]:
        if layer.bits != 8:
            return super().pack(layer, summary)
        tensors = {"weight": (layer.qweight ^ _SIGN).view(torch.int8), "weight_scale": layer.scales}
        return tensors if layer.bias is None else tensors | {"bias": layer.bias}

    def unpack(self, tensors: Mapping[str, Tensor], settings: Settings) -> PackedLinear:
        if settings.compute != "int8":
            return super().unpack(tensors, settings)
        self.require(tensors, _INTEGERS)
        weight, scales = tensors["weight"], tensors["weight_scale"]
        if weight.dim() != 2 or scales.dim() != 2 or not weight.numel():
            raise CheckpointError(f"weight has shape {tuple(weight.shape)}, weight_scale {tuple(scales.shape)}")
        (n, k), groups = weight.shape, scales.shape[1]
        expect("weight", weight, (n, k), (torch.int8,))
        expect("weight_scale", scales, (n, groups), FLOATS)
        size = settings.group_size(k, groups)
        if (zeros := tensors.get("weight_zero_point")) is None:
            zeros = torch.zeros(n, groups, dtype=torch.int8)
        expect("weight_zero_point", zeros, (n, groups), (torch.int8,))
        codes, zeros = (each.contiguous().view(torch.uint8) ^ _SIGN for each in (weight, zeros))
        bias = self.bias_of(tensors, n)
        return PackedLinear(codes, scales.contiguous(), zeros, k, size, bias, bits=8, compute=settings.compute)

    def problems(self, name: str, layer: PackedLinear) -> list[str]:
        found = super().problems(name, layer)
        if layer.bits == 8 and not (layer.groups == 1 and layer.symmetric):
            has = f"groups of {layer.group_size}" if layer.groups > 1 else "zero points"
            found.append(
                f"it has 8 bits with {has}, and W8A8 one scale a row without zero points: quantize it with "
                'per_layer={"PATTERN": {"bits": 8, "group_size": -1, "symmetric": True}}, or use format="compressed-tensors", '
                "which leaves its activations in 16 bits"
            )
        return found

    def quantization_config(self, summary: Summary) -> dict[str, Any]:
        config = super().quantization_config(summary)
        for group in config["config_groups"].values():
            group["format"] = PACKED
            if group["weights"]["num_bits"] == 8:
                group["weights"]["symmetric"] = True  # whatever those of 4 bits are
                group |= {"format": INTEGERS, "input_activations": dict(TOKENS)}
        formats = {group["format"] for group in config["config_groups"].values()}
        return config | {"format": MIXED if len(formats) > 1 else formats.pop()}

    def reads(self, config: Mapping[str, Any]) -> Settings | None:
        return read(config) if config.get("quant_method") == METHOD else None

    def claims(self, leaves: Mapping[str, torch.dtype]) -> bool:
        return "weight_packed" in leaves or leaves.get("weight") == torch.int8
