"""AutoAWQ "gemm": what most AWQ checkpoints on the Hugging Face hub are; read by Transformers, vLLM, SGLang, LMDeploy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .layout import Layout, Summary
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
from .words import gathered, pack_words, rows_of, spread, transposed, unpack_words, words_of

_KNOWN = HOW_IT_WAS_MADE | {
    "method": one_of("awq"),
    **dict.fromkeys(("quant_method", "bits", "w_bit", "group_size", "q_group_size"), anything),
    **dict.fromkeys(("version", "format", "checkpoint_format", "dynamic"), anything),
}


def awq_config(summary: Summary, version: str) -> dict[str, Any]:
    """Make the quantization_config that AutoAWQ writes."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": summary.group_sizes()[0],
        "zero_point": True,
        "version": version,
        # matched by substring; null would do for lm_head alone, but not every reader knows it by itself
        "modules_to_not_convert": summary.called(summary.float_linears) or None,
    }


def awq_settings(config: Mapping[str, Any], *versions: str) -> Settings | None:
    """Read the settings of an "awq" config of one of these versions; None for another."""
    method = config.get("quant_method", "awq" if "w_bit" in config else None)
    # "backend" of old Transformers configs told which kernels to use, and "format" is what newer ones call the version
    version = config.get("version") or config.get("format") or "gemm"
    if method != "awq" or not isinstance(version, str) or version.lower() not in versions:
        return None
    require_known(config, _KNOWN)
    size = checked_group_size(int_setting(config, "group_size", "q_group_size"), 128)
    return with_dynamic(Settings((size,)), config, "bits", "w_bit")


def read_through(names: list[str], quantized: Collection[str]) -> list[str]:
    """Find names of float Linears that are part of a quantized layer's name: readers match by substring and would skip both."""
    return [name for name in names if any(name in other for other in quantized)]


class AwqLayout(Layout):
    """What the layouts of AutoAWQ share."""

    version: str

    def quantization_config(self, summary: Summary) -> dict[str, Any]:
        return awq_config(summary, self.version)

    def reads(self, config: Mapping[str, Any]) -> Settings | None:
        return awq_settings(config, self.version)

    def model_problems(self, summary: Summary) -> list[str]:
        found = super().model_problems(summary)
        for name in read_through(summary.called(summary.float_linears), summary.called(summary.layers)):
            found.append(
                f"the float Linear {name} would hide quantized ones whose names contain it, because readers compare "
                "modules_to_not_convert by substring: leave those float too, or quantize it"
            )
        return found


class Gemm(AwqLayout):
    """qweight int32 [K, N/8], qzeros int32 [G, N/8] (zeros as they are), scales fp16 [G, N].

    Bits 4i to 4i + 3 of word c hold column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i].
    """

    name = "awq"
    version = "gemm"
    rows_at = ("scales", 1)
    suffixes = ("qweight", "qzeros", "scales")
    divisors = (8, 1)

    def pack(self, layer: PackedLinear, summary: Summary | None = None) -> dict[str, Tensor]:
        tensors = {
            "qweight": spread(transposed(words_of(layer.qweight), layer.in_features)),
            "qzeros": spread(pack_words(layer.zeros.T)),
            "scales": self.stored_scales(layer).T.contiguous(),
        }
        return tensors if layer.bias is None else tensors | {"bias": layer.bias}

    def unpack(self, tensors: Mapping[str, Tensor], settings: Settings) -> PackedLinear:
        self.require(tensors)
        qweight, scales = tensors["qweight"], tensors["scales"]
        if qweight.dim() != 2 or scales.dim() != 2:
            raise CheckpointError(f"qweight and scales have shapes {tuple(qweight.shape)} and {tuple(scales.shape)}")
        (k, words), groups = qweight.shape, len(scales)
        expect("qweight", qweight, (k, words), (torch.int32,))
        expect("scales", scales, (groups, words * 8), (torch.float16, torch.bfloat16, torch.float32))
        expect("qzeros", tensors["qzeros"], (groups, words), (torch.int32,))
        return PackedLinear(
            qweight=rows_of(transposed(gathered(qweight), words * 8), k),
            scales=scales.T.contiguous(),
            zeros=unpack_words(gathered(tensors["qzeros"]), words * 8).T.contiguous(),
            in_features=k,
            group_size=settings.group_size(k, groups),
            bias=self.bias_of(tensors, words * 8),
        )

    def claims(self, leaves: Mapping[str, torch.dtype]) -> bool:
        return leaves.get("qweight") == torch.int32
