"""GPTQ: the layout of AutoGPTQ and GPTQModel, four bits, without reordered channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layout import FLOATS, Layout, Summary
from .packed import CheckpointError, PackedLinear, expect
from .settings import (
    HOW_IT_WAS_MADE,
    Settings,
    anything,
    checked_group_size,
    int_setting,
    one_of,
    require_known,
    with_dynamic,
)
from .words import pack_words, rows_of, unpack_words, words_of

_KNOWN = HOW_IT_WAS_MADE | {
    "method": one_of("gptq"),
    **dict.fromkeys(("quant_method", "bits", "group_size", "checkpoint_format", "format", "dynamic"), anything),
}


class Gptq(Layout):
    """qweight int32 [K/8, N], qzeros int32 [G, N/8], scales fp16 [G, N], g_idx int32 [K] = k // g; natural order.

    Version 1 stores zero - 1 (modulo 16, as its first reader takes it), version 2 the zero itself.
    """

    name = "gptq"
    rows_at = ("scales", 1)
    suffixes = ("qweight", "qzeros", "scales")
    optional = ("bias", "g_idx")
    short_groups = True
    quantized_heads = True
    divisors = (8, 8)

    def problems(self, name: str, layer: PackedLinear) -> list[str]:
        found = super().problems(name, layer)
        if not bool(layer.zeros.all()):
            found.append("a zero of 0, stored as -1, is read differently by different readers: use symmetric=True")
        return found

    def pack(self, layer: PackedLinear, summary: Summary | None = None) -> dict[str, Tensor]:
        k = layer.in_features
        length = k if layer.group_size == -1 else layer.group_size
        tensors = {
            "qweight": words_of(layer.qweight).T.contiguous(),
            "qzeros": pack_words((layer.zeros - 1 & 15).T),
            "scales": self.stored_scales(layer).T.contiguous(),
            "g_idx": torch.arange(k, dtype=torch.int32) // length,
        }
        return tensors if layer.bias is None else tensors | {"bias": layer.bias}

    def unpack(self, tensors: Mapping[str, Tensor], settings: Settings) -> PackedLinear:
        self.require(tensors)
        qweight, scales = tensors["qweight"], tensors["scales"]
        if qweight.dim() != 2 or scales.dim() != 2:
            raise CheckpointError(f"qweight and scales have shapes {tuple(qweight.shape)} and {tuple(scales.shape)}")
        (k, n), groups = (qweight.shape[0] * 8, qweight.shape[1]), len(scales)
        expect("qweight", qweight, (k // 8, n), (torch.int32,))
        expect("scales", scales, (groups, n), FLOATS)
        expect("qzeros", tensors["qzeros"], (groups, n // 8), (torch.int32,))
        size = settings.group_size(k, groups, short=True)
        if (order := tensors.get("g_idx")) is not None:
            expect("g_idx", order, (k,), (torch.int32, torch.int64))
            if not torch.equal(order.long(), torch.arange(k) // (k if size == -1 else size)):
                raise CheckpointError(
                    "g_idx reorders the channels (desc_act): awq_ext reads GPTQ checkpoints made without it"
                )
        zeros = unpack_words(tensors["qzeros"], n)
        return PackedLinear(
            qweight=rows_of(qweight.T, k),
            scales=scales.T.contiguous(),
            zeros=(zeros + settings.zero_offset & 15).T.contiguous(),
            in_features=k,
            group_size=size,
            bias=self.bias_of(tensors, n),
        )

    def quantization_config(self, summary: Summary) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": summary.group_sizes()[0],
            "desc_act": False,
            "sym": summary.symmetric,
            "lm_head": bool(summary.heads),
            "checkpoint_format": "gptq",
            "modules_to_not_convert": list(summary.float_linears) or None,
        }

    def reads(self, config: Mapping[str, Any]) -> Settings | None:
        if config.get("quant_method", "gptq" if "desc_act" in config else None) != "gptq":
            return None
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version not in ("gptq", "gptq_v2"):
            raise CheckpointError(f"quantization_config: checkpoint_format={version!r}; gptq and gptq_v2 can be read")
        require_known(config, _KNOWN)
        size = checked_group_size(int_setting(config, "group_size"), 128)
        return with_dynamic(Settings((size,), zero_offset=1 if version == "gptq" else 0), config, "bits")

    def claims(self, leaves: Mapping[str, torch.dtype]) -> bool:
        return leaves.get("qweight") == torch.int32
