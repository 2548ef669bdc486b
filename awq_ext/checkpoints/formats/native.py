"""awq_ext's own tensors under a Hugging Face config: the one layout that holds every quantized model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .in_memory import InMemory
from .layout import FLOATS, Layout, Summary
from .packed import CheckpointError, PackedLinear, expect
from .settings import Settings, anything, checked_group_size, int_setting, require_bits, require_known

_KNOWN = dict.fromkeys(
    ("quant_method", "bits", "version", "layers", "experts", "rescaled", "modules_to_not_convert", "in_memory"),
    anything,
)

_NO_WEIGHT = torch.empty(0, dtype=torch.uint8)


class Native(Layout):
    """qweight uint8 [N, ceil(K/2)], scales [N, G], zeros uint8 [N, G], pre_quant_scale fp32 [K]: docs/checkpoint.md.

    The config has ``layers``: name -> [in_features, group_size], because shapes do not tell them; and ``experts``: name of a
    parameter [E, N, K] whose matrices are layers -> how the model uses it (``experts.USES``); ``rescaled``: name -> factor, where
    QuantLinear.rescaled is not 1; and ``in_memory`` where awq_ext.save wrote it. An empty ``weight`` stands where readers that do
    not know the layout would find none and go on with random weights, as Transformers does after a warning: of a wrong shape, it
    is an error to them.
    """

    name = "native"
    rows_at = ("scales", 0)
    suffixes = ("qweight", "scales", "zeros")
    optional = ("pre_quant_scale", "bias", "weight")
    scale_dtypes = (torch.float16, torch.bfloat16)
    mixes_group_sizes = True
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
        ((name, (k, size)),) = settings.per_layer.items()
        factor = settings.rescaled.get(name, 1.0)
        if qweight.dim() != 2:
            raise CheckpointError(f"qweight has shape {tuple(qweight.shape)}, two dimensions are needed")
        n = qweight.shape[0]
        layer = PackedLinear(qweight, scales, zeros, k, size, self.bias_of(tensors, n), scale, factor)
        expect("qweight", qweight, (n, (k + 1) // 2), (torch.uint8,))
        expect("scales", scales, (n, layer.groups), FLOATS[:2])
        expect("zeros", zeros, (n, layer.groups), (torch.uint8,))
        expect("weight", tensors.get("weight", _NO_WEIGHT), (0,), (torch.uint8,))
        if bool((zeros > 15).any()):
            raise CheckpointError(f"zeros must be below 16, got {int(zeros.max())}")
        if scale is not None:
            expect("pre_quant_scale", scale, (k,), (torch.float32,))
        return layer

    def quantization_config(self, summary: Summary) -> dict[str, Any]:
        config = {
            "quant_method": "awq_ext",
            "bits": 4,
            "version": 1,
            "layers": {name: [facts.in_features, facts.group_size] for name, facts in summary.layers.items()},
            "experts": dict(summary.experts),
            "modules_to_not_convert": list(summary.float_linears) or None,
        }
        if rescaled := {name: facts.rescaled for name, facts in summary.layers.items() if facts.rescaled != 1}:
            config["rescaled"] = rescaled
        return config if summary.in_memory is None else config | {"in_memory": summary.in_memory.entry()}

    def reads(self, config: Mapping[str, Any]) -> Settings | None:
        if config.get("quant_method") != "awq_ext":
            return None
        require_bits(config, "bits")
        layers, version = config.get("layers"), int_setting(config, "version")
        if version != 1:
            raise CheckpointError(f"quantization_config: version {version}; this awq_ext reads version 1")
        require_known(config, _KNOWN)
        if not isinstance(layers, dict) or not all(_is_pair(entry) for entry in layers.values()):
            raise CheckpointError("quantization_config: layers must be name -> [in_features, group_size]")
        experts = config.get("experts", {})
        if not isinstance(experts, dict) or not all(isinstance(use, str) for use in experts.values()):
            raise CheckpointError("quantization_config: experts must be name -> use")
        rescaled = config.get("rescaled", {})
        if not isinstance(rescaled, dict) or not all(_is_factor(name in layers, f) for name, f in rescaled.items()):
            raise CheckpointError("quantization_config: rescaled must be name of a layer -> power of two")
        per_layer = {name: (k, checked_group_size(size)) for name, (k, size) in layers.items()}
        in_memory = InMemory.read(config["in_memory"]) if "in_memory" in config else None
        if in_memory is not None and any(size != -1 and size % 8 for _, size in per_layer.values()):
            raise CheckpointError("quantization_config: layers has a group size that is no multiple of 8")
        sizes = tuple(dict.fromkeys(size for _, size in per_layer.values()))
        return Settings(sizes, per_layer, experts=experts, in_memory=in_memory, rescaled=rescaled)

    def claims(self, leaves: Mapping[str, torch.dtype]) -> bool:
        return leaves.get("qweight") == torch.uint8 and "zeros" in leaves


def _is_factor(known: bool, value: object) -> bool:
    return known and isinstance(value, float) and math.isfinite(value) and math.frexp(value)[0] == 0.5


def _is_pair(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(type(v) is int for v in entry) and entry[0] > 0
