"""BlockResult: all that quantizing one block changes in a model, and what is told of it; in memory and in a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.quant_linear import TILED, QuantLinear
from ..modules import take_hooks
from ..reporting.report import BlockReport, LayerReport

_HELD = (*TILED.values(), "pre_quant_scale")


@dataclass
class BlockResult:
    """What takes the place of a block's Linears, and of parameters beside them (biases, norms).

    modules: by the names of the Linears, QuantLinear, or nn.Linear for ``packed=False``. writes: by the names of parameters.
    warnings: of this block alone. padded: Linears whose rows included padding. pattern: what the search for folds remembers for
    later blocks (``FoldFinder.remembered``). elapsed: seconds of the whole quantization until this block was finished.
    """

    block: BlockReport
    modules: dict[str, nn.Module] = field(default_factory=dict)
    writes: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    padded: list[str] = field(default_factory=list)
    pattern: list[dict[str, Any]] | None = None
    calibration_seconds: float = 0.0
    search_seconds: float = 0.0
    elapsed: float = 0.0
    peak_bytes: int = 0

    @property
    def weights(self) -> int:
        """Number of weights that are quantized."""
        return sum(layer.in_features * layer.out_features for layer in self.layers)

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Take it apart into tensors and plain values."""
        tensors = {f"parameter:{name}": value for name, value in self.writes.items()}
        kinds = {}
        for name, module in self.modules.items():
            if isinstance(module, QuantLinear):
                kinds[name] = {
                    "group_size": module.group_size,
                    "bits": module.bits,
                    "rescaled": module.rescaled,
                    "scale_dtype": str(module.tile_scales.dtype).removeprefix("torch."),
                }
                held = {leaf: module._buffers[leaf] for leaf in _HELD}
            else:
                kinds[name], held = None, {"weight": module.weight}
            tensors |= {f"module:{name}:{leaf}": tensor for leaf, tensor in held.items() if tensor is not None}
        told = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        told |= {"block": dataclasses.asdict(self.block), "layers": [dataclasses.asdict(row) for row in self.layers]}
        del told["modules"], told["writes"]
        return tensors, {"modules": kinds, "told": told}

    @classmethod
    def read(
        cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any], linears: Mapping[str, nn.Linear]
    ) -> BlockResult:
        """Put it together again. linears: those that the modules take the place of, whose bias, hooks and device they take over."""
        told = dict(values["told"])
        told["block"] = BlockReport(**told["block"])
        told["layers"] = [LayerReport(**row) for row in told["layers"]]
        prefix = "parameter:"
        writes = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
        modules = {
            name: _module(
                linears[name], kind, {leaf: tensors.get(f"module:{name}:{leaf}") for leaf in (*_HELD, "weight")}
            )
            for name, kind in values["modules"].items()
        }
        return cls(modules=modules, writes=writes, **told)

    def map_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        """Let the quantized layers hold ``tensors``, mapped from the file that :meth:`stored` went to, instead of their own."""
        for name, module in self.modules.items():
            for leaf in _HELD if isinstance(module, QuantLinear) else ():
                if module._buffers[leaf] is not None:
                    module._buffers[leaf] = tensors[f"module:{name}:{leaf}"]


@torch.no_grad()
def _module(old: nn.Linear, kind: Mapping[str, Any] | None, held: Mapping[str, Tensor | None]) -> nn.Module:
    near = old.weight.device
    moved = {leaf: None if tensor is None else tensor.to(near) for leaf, tensor in held.items()}
    module: nn.Module
    if kind is None:
        module = nn.Linear(old.in_features, old.out_features, device="meta")
        module.weight = nn.Parameter(moved["weight"], requires_grad=old.weight.requires_grad)
    else:
        scale_dtype = getattr(torch, kind["scale_dtype"])
        module = QuantLinear.empty_like(old, kind["group_size"], False, scale_dtype, "meta", kind["bits"])
        for leaf in _HELD:
            module._buffers[leaf] = moved[leaf]
        if kind["rescaled"] != 1:
            module.rescaled = kind["rescaled"]
    module.bias = old.bias
    take_hooks(module, old)
    return module.train(old.training)
