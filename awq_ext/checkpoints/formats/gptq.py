"""GPTQ: the layout of AutoGPTQ and GPTQModel, 4 or 8 bits, without reordered channels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layout import FLOATS, JOINED, Layout, Summary
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
    """qweight int32 [K/P, N], qzeros int32 [G, N/P], scales fp16 [G, N], g_idx int32 [K] = k // g; natural order, P = 32 / bits.

    Version 1 stores zero - 1 (modulo 2^bits, as its first reader takes it; GPTQModel subtracts from whole words, see Settings),
    version 2 the zero itself. Layers of other bits than the config's are in its ``dynamic``.
    """

    name = "gptq"
    rows_at = ("scales", 1)
    suffixes = ("qweight", "qzeros", "scales")
    optional = ("bias", "g_idx")
    widths = (4, 8)
    short_groups = True
    quantized_heads = True
    divisors = (8, 8)
    symmetric_bits = (4, 8)

    def problems(self, name: str, layer: PackedLinear) -> list[str]:
        found = super().problems(name, layer)
        if not bool(layer.zeros.all()):
            found.append("a zero of 0, stored as -1, is read differently by different readers: use symmetric=True")
        return found

    def pack(self, layer: PackedLinear, summary: Summary | None = None) -> dict[str, Tensor]:
        k, bits = layer.in_features, layer.bits
        length = k if layer.group_size == -1 else layer.group_size
        tensors = {
            "qweight": words_of(layer.qweight).T.contiguous(),
            "qzeros": pack_words((layer.zeros - 1 & (1 << bits) - 1).T, bits),
            "scales": self.stored_scales(layer).T.contiguous(),
            "g_idx": torch.arange(k, dtype=torch.int32) // length,
        }
        return tensors if layer.bias is None else tensors | {"bias": layer.bias}

    def unpack(self, tensors: Mapping[str, Tensor], settings: Settings) -> PackedLinear:
        self.require(tensors)
        qweight, scales = tensors["qweight"], tensors["scales"]
        if qweight.dim() != 2 or scales.dim() != 2:
            raise CheckpointError(f"qweight and scales have shapes {tuple(qweight.shape)} and {tuple(scales.shape)}")
        bits = settings.width
        (k, n), groups, per_word = (qweight.shape[0] * 32 // bits, qweight.shape[1]), len(scales), 32 // bits
        expect("qweight", qweight, (k // per_word, n), (torch.int32,))
        expect("scales", scales, (groups, n), FLOATS)
        expect("qzeros", tensors["qzeros"], (groups, n // per_word), (torch.int32,))
        size = settings.group_size(k, groups, short=True)
        if (order := tensors.get("g_idx")) is not None:
            expect("g_idx", order, (k,), (torch.int32, torch.int64))
            if not torch.equal(order.long(), torch.arange(k) // (k if size == -1 else size)):
                raise CheckpointError(
                    "g_idx reorders the channels (desc_act): awq_ext reads GPTQ checkpoints made without it"
                )
        zeros = _zeros(tensors["qzeros"], n, settings)
        return PackedLinear(
            qweight=rows_of(qweight.T, k, bits),
            scales=scales.T.contiguous(),
            zeros=zeros.T.contiguous(),
            in_features=k,
            group_size=size,
            bias=self.bias_of(tensors, n),
            bits=bits,
        )

    def quantization_config(self, summary: Summary) -> dict[str, Any]:
        usual, *others = summary.widths()
        wide = {name for name, facts in summary.layers.items() if facts.bits != usual}
        dynamic = {
            pattern: {"bits": bits} for bits in others for pattern in _patterns(wide, set(summary.layers) - wide)
        }
        return {
            "quant_method": "gptq",
            "bits": usual,
            "group_size": summary.group_sizes()[0],
            "desc_act": False,
            "sym": summary.symmetric,
            "lm_head": bool(summary.heads),
            "checkpoint_format": "gptq",
            "modules_to_not_convert": summary.called(summary.float_linears) or None,
        } | ({"dynamic": dynamic} if dynamic else {})

    def reads(self, config: Mapping[str, Any]) -> Settings | None:
        if config.get("quant_method", "gptq" if "desc_act" in config else None) != "gptq":
            return None
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version not in ("gptq", "gptq_v2"):
            raise CheckpointError(f"quantization_config: checkpoint_format={version!r}; gptq and gptq_v2 can be read")
        require_known(config, _KNOWN)
        size = checked_group_size(int_setting(config, "group_size"), 128)
        offset = 1 if version == "gptq" else 0
        settings = Settings((size,), zero_offset=offset, borrowed=_by_gptqmodel(config))
        return with_dynamic(settings, config, "bits", widths=self.widths)

    def claims(self, leaves: Mapping[str, torch.dtype]) -> bool:
        return leaves.get("qweight") == torch.int32


def _zeros(words: Tensor, columns: int, settings: Settings) -> Tensor:
    """Unpack stored zeros, int32 [G, ceil(N/P)] -> the zeros, uint8 [G, N]."""
    bits, offset = settings.width, settings.zero_offset
    if settings.borrowed:
        ones = sum(offset << bits * place for place in range(32 // bits))
        return unpack_words((words.long() + ones).to(torch.int32), columns, bits)
    return unpack_words(words, columns, bits) + offset & (1 << bits) - 1


def _by_gptqmodel(config: Mapping[str, Any]) -> bool:
    """Tell whether GPTQModel says that it wrote the tensors, alone or for Optimum."""
    meta = config.get("meta")
    said = meta.get("quantizer") if isinstance(meta, dict) else None
    return any(str(each).startswith("gptqmodel:") for each in (said if isinstance(said, list) else [said]))


def _patterns(names: set[str], others: set[str]) -> list[str]:
    """Make keys of ``dynamic`` that fit ``names`` and none of ``others``: with any number where all numbers are meant.

    Servers ask by the name of the layer that they join q, k and v, or gate and up, to; it gets a key too.
    """
    joined = ((JOINED[0], "qkv_proj"), (JOINED[1], "gate_up_proj"))
    asked = set(names)
    for name in names:
        prefix, dot, leaf = name.rpartition(".")
        for parts, whole in joined:
            if leaf == parts[0] and all(f"{prefix}{dot}{part}" in names for part in parts):
                asked.add(f"{prefix}{dot}{whole}")
    found, free = {}, {}
    for name in sorted(asked):
        exact = f"{re.escape(name)}$"
        general = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", exact)
        if general not in free:
            free[general] = not any(re.match(general, other) for other in others)
        found[f"+:{general if free[general] else exact}"] = None
    return list(found)
