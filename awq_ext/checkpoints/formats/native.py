"""awq_ext's own tensors under a Hugging Face config: the one layout that holds every quantized model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...kernels.reference import TILE_BITS
from ...layers.quantized_weight import row_bytes
from .in_memory import InMemory
from .layout import FLOATS, Layout, Summary
from .packed import CheckpointError, PackedLinear, expect
from .settings import Settings, anything, checked_group_size, int_setting, require_known

_KNOWN = dict.fromkeys(
    ("quant_method", "bits", "version", "layers", "experts", "rescaled", "modules_to_not_convert", "in_memory"),
    anything,
)

_NO_WEIGHT = torch.empty(0, dtype=torch.uint8)


class Native(Layout):
    """qweight uint8 [N, ceil(K/2)] or, for 8 bits, [N, K]; scales [N, G], zeros uint8 [N, G], pre_quant_scale fp32 [K].

    See docs/checkpoint.md. The config has ``layers``: name -> [in_features, group_size], because shapes do not tell them, with the
    bits as a third number where they are others than the config's ``bits``; ``experts``: name of a parameter [E, N, K] whose
    matrices are layers -> how the model uses it (``experts.USES``); ``rescaled``: name -> factor, where QuantLinear.rescaled is
    not 1; and ``in_memory`` where awq_ext.save wrote it. An empty ``weight`` stands where readers that do not know the layout would
    find none and go on with random weights, as Transformers does after a warning: of a wrong shape, it is an error to them.
    """

    name = "native"
    rows_at = ("scales", 0)
    suffixes = ("qweight", "scales", "zeros")
    optional = ("pre_quant_scale", "bias", "weight")
    scale_dtypes = (torch.float16, torch.bfloat16)
    widths = TILE_BITS
    mixes_group_sizes = True
    quantized_heads = True
    short_groups = True
    run_time_scales = True
    holds_rescaled = True
    joined_experts = True
    holds_memory = True

    def pack(self, layer: PackedLinear, summary: Summary | None = None) -> dict[str, Tensor]:
        tensors = {"qweight": layer.qweight, "scales": self.stored_scales(layer), "zeros": layer.zeros}
        rest = {"weight": _NO_WEIGHT, "pre_quant_scale": layer.pre_quant_scale, "bias": layer.bias}
        return tensors | {name: tensor for name, tensor in rest.items() if tensor is not None}

    def unpack(self, tensors: Mapping[str, Tensor], settings: Settings) -> PackedLinear:
        self.require(tensors)
        qweight, scales, zeros = (tensors[suffix] for suffix in self.suffixes)
        scale = tensors.get("pre_quant_scale")
        if len(settings.per_layer) != 1:
            raise CheckpointError("quantization_config does not describe this layer")
        ((name, (k, size, bits)),) = settings.per_layer.items()
        factor = settings.rescaled.get(name, 1.0)
        if qweight.dim() != 2:
            raise CheckpointError(f"qweight has shape {tuple(qweight.shape)}, two dimensions are needed")
        n = qweight.shape[0]
        bias = self.bias_of(tensors, n)
        layer = PackedLinear(qweight, scales, zeros, k, size, bias, scale, bits=bits, rescaled=factor)
        expect("qweight", qweight, (n, row_bytes(k, bits)), (torch.uint8,))
        expect("scales", scales, (n, layer.groups), FLOATS[:2])
        expect("zeros", zeros, (n, layer.groups), (torch.uint8,))
        expect("weight", tensors.get("weight", _NO_WEIGHT), (0,), (torch.uint8,))
        if zeros.numel() and int(zeros.max()) >= 1 << bits:
            raise CheckpointError(f"zeros must be below {1 << bits}, got {int(zeros.max())}")
        if scale is not None:
            expect("pre_quant_scale", scale, (k,), (torch.float32,))
        return layer

    def quantization_config(self, summary: Summary) -> dict[str, Any]:
        usual = summary.widths()[0]
        entries = {name: [facts.in_features, facts.group_size, facts.bits] for name, facts in summary.layers.items()}
        config = {
            "quant_method": "awq_ext",
            "bits": usual,
            "version": 1,
            "layers": {name: entry[: 2 if entry[2] == usual else 3] for name, entry in entries.items()},
            "experts": dict(summary.experts),
            "modules_to_not_convert": list(summary.float_linears) or None,
        }
        if rescaled := {name: facts.rescaled for name, facts in summary.layers.items() if facts.rescaled != 1}:
            config["rescaled"] = rescaled
        return config if summary.in_memory is None else config | {"in_memory": summary.in_memory.entry()}

    def reads(self, config: Mapping[str, Any]) -> Settings | None:
        if config.get("quant_method") != "awq_ext":
            return None
        usual = _checked_bits(4 if (said := int_setting(config, "bits")) is None else said)
        layers, version = config.get("layers"), int_setting(config, "version")
        if version != 1:
            raise CheckpointError(f"quantization_config: version {version}; this awq_ext reads version 1")
        require_known(config, _KNOWN)
        if not isinstance(layers, dict) or not all(map(_is_entry, layers.values())):
            raise CheckpointError(
                "quantization_config: layers must be name -> [in_features, group_size] or [..., bits]"
            )
        experts = config.get("experts", {})
        if not isinstance(experts, dict) or not all(isinstance(use, str) for use in experts.values()):
            raise CheckpointError("quantization_config: experts must be name -> use")
        rescaled = config.get("rescaled", {})
        if not isinstance(rescaled, dict) or not all(_is_factor(name in layers, f) for name, f in rescaled.items()):
            raise CheckpointError("quantization_config: rescaled must be name of a layer -> power of two")
        per_layer = {
            name: (k, checked_group_size(size), _checked_bits(own[0]) if own else usual)
            for name, (k, size, *own) in layers.items()
        }
        in_memory = InMemory.read(config["in_memory"]) if "in_memory" in config else None
        if in_memory is not None and any(size != -1 and size % 8 for _, size, _ in per_layer.values()):
            raise CheckpointError("quantization_config: layers has a group size that is no multiple of 8")
        sizes = tuple(dict.fromkeys(size for _, size, _ in per_layer.values()))
        return Settings(sizes, per_layer, experts=experts, in_memory=in_memory, rescaled=rescaled)

    def claims(self, leaves: Mapping[str, torch.dtype]) -> bool:
        return leaves.get("qweight") == torch.uint8 and "zeros" in leaves


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) in (2, 3) and all(type(v) is int for v in entry) and entry[0] > 0


def _checked_bits(bits: int) -> int:
    if bits not in TILE_BITS:
        raise CheckpointError(f"quantization_config: {bits} bits; awq_ext runs {' or '.join(map(str, TILE_BITS))}")
    return bits


def _is_factor(known: bool, value: object) -> bool:
    return known and isinstance(value, float) and math.isfinite(value) and math.frexp(value)[0] == 0.5
