"""Take from a model in memory what goes into files: quantized layers, float tensors, config.json."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.quant_linear import TILED, QuantLinear
from ..layers.quantized_weight import row_bytes
from ..modules import heads_among
from ..standins.expert_linears import ExpertLinears
from .conversions import is_transformers_model
from .formats import CheckpointError, InMemory, PackedLinear
from .quantized_dir import CONFIG, without_settings

_ROWS = {buffer: leaf for leaf, buffer in TILED.items()}


class ModelSource:
    """A quantized model, layer by layer: what a QuantDir is for files. CheckpointError when nothing is quantized.

    whole: with the buffers outside ``state_dict`` too, and with ``experts`` and ``in_memory``, as awq_ext.save needs them.
    """

    def __init__(self, model: nn.Module, whole: bool = False) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self.layers = {name: module for name, module in modules.items() if isinstance(module, QuantLinear)}
        if not self.layers:
            raise CheckpointError(
                f"{type(model).__name__} holds no QuantLinear: quantize it first (fake-quantized models, packed=False, are "
                "ordinary float models: use torch.save or their own save_pretrained)"
            )
        self.heads = list(heads_among(model, self.layers))
        self._floats = _float_tensors(model, whole)
        self.floats = list(self._floats)
        if meta := [name for name, tensor in self._floats.items() if tensor.is_meta]:
            raise CheckpointError(f"{meta[0]} is on the meta device: it has no values to save")
        self.experts: dict[str, str] = {}
        self.in_memory: InMemory | None = None
        if whole:
            self.experts = {name: module.use for name, module in modules.items() if isinstance(module, ExpertLinears)}
            run_time = {name: (layer.dtype, layer.compute) for name, layer in self.layers.items()}
            self.in_memory = InMemory(_ties(model, self._floats), run_time)

    def rows(self, name: str) -> int:
        """out_features of one of ``layers``."""
        return self.layers[name].out_features

    def layer(self, name: str) -> PackedLinear:
        """Convert one QuantLinear to rows, on the CPU."""
        return replace(self.outline(name), qweight=self.layers[name].qweight.cpu())

    def outline(self, name: str) -> PackedLinear:
        """Convert the same without its codes, which are on the meta device."""
        layer = self.layers[name]
        if layer.tiles.is_meta:
            raise CheckpointError(f"{name} is on the meta device: it has no values to save")
        bias, scale = layer.bias, layer.pre_quant_scale
        shape = (layer.out_features, row_bytes(layer.in_features, layer.bits))
        return PackedLinear(
            qweight=torch.empty(shape, dtype=torch.uint8, device="meta"),
            scales=layer.scales.cpu(),
            zeros=layer.zeros.cpu(),
            in_features=layer.in_features,
            group_size=layer.group_size,
            bias=None if bias is None else bias.detach().cpu(),
            pre_quant_scale=None if scale is None else scale.cpu(),
            bits=layer.bits,
            rescaled=layer.rescaled,
        )

    def float_tensor(self, name: str) -> Tensor:
        """Return one of ``floats``."""
        return self._floats[name].detach()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of ``floats``."""
        return tuple(self._floats[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of one of ``floats``."""
        return self._floats[name].dtype


def _tensors(module: nn.Module, whole: bool) -> Iterator[tuple[str, Tensor]]:
    """List a module's own parameters and buffers; those outside ``state_dict`` only where ``whole``."""
    for leaf, tensor in (module._parameters | module._buffers).items():
        if tensor is not None and (whole or leaf not in module._non_persistent_buffers_set):
            yield leaf, tensor


def _float_tensors(model: nn.Module, whole: bool) -> dict[str, Tensor]:
    """Find the tensors outside the quantized layers, tied ones once, under the name that files have them by.

    Not from ``state_dict``, which would turn every int4 layer into rows.
    """
    dropped = dropped_ties(model)
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in () if isinstance(module, QuantLinear) else _tensors(module, whole):
            name = f"{prefix}.{leaf}".lstrip(".")
            if id(tensor) not in found or (dropped(found[id(tensor)][0]) and not dropped(name)):
                found[id(tensor)] = (name, tensor)
    return dict(found.values())


def _ties(model: nn.Module, floats: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each further name of a tensor to the one that it is stored under, tensors of int4 layers included."""
    first = {id(tensor): name for name, tensor in floats.items()}
    tied = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        rows = _ROWS if isinstance(module, QuantLinear) else {}
        for leaf, tensor in _tensors(module, whole=True):
            name = f"{prefix}.{rows.get(leaf, leaf)}".lstrip(".")
            if (stored := first.setdefault(id(tensor), name)) != name:
                tied[name] = stored
    return tied


def dropped_ties(model: nn.Module) -> Callable[[str], bool]:
    """Tell by name whether transformers leaves a tensor out of files if it is tied to another."""
    patterns = list(getattr(model, "_tied_weights_keys", None) or [])
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def keep_apart(model: nn.Module, names: Collection[str]) -> None:
    """Take parameters that came apart from transformers' own list of ties, as it does itself.

    The config goes on saying that they are tied: some models (T5's family) scale by what it says.
    """
    ties = getattr(model, "all_tied_weights_keys", None)
    for name in names if isinstance(ties, dict) else ():
        ties.pop(name, None)


def float_linears(model: nn.Module) -> list[str]:
    """Name what is not quantized and has a Linear's weight: routers of experts too, which other readers have as Linears."""
    modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if not isinstance(m, nn.Embedding)}
    weights = {name: module._parameters.get("weight") for name, module in modules.items()}
    return [name for name, weight in weights.items() if weight is not None and weight.dim() == 2]


def origin(model: nn.Module) -> Path | None:
    """Find the directory that a model was loaded from, in the Hugging Face cache if it came from the hub."""
    if not is_transformers_model(model):
        return None
    name = getattr(model.config, "_name_or_path", "")
    if not isinstance(name, str) or not name:
        return None
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, CONFIG, revision=getattr(model.config, "_commit_hash", None))
    except HFValidationError:
        return None  # the path of a directory that is gone
    return Path(config).parent if isinstance(config, str) else None


def config_of(model: nn.Module) -> dict[str, Any]:
    """Make config.json without quantization_config; the model's own config stays as it is."""
    if not is_transformers_model(model):
        return {"architectures": [type(model).__name__]}
    config = without_settings(json.loads(model.config.to_json_string()))
    config.pop("_attn_implementation_autoset", None)  # with it transformers 4 would skip its own choice
    config["architectures"] = [type(model).__name__]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")  # the latter: before transformers 4.56
    _add_old_rope(config)
    return config


def _add_old_rope(config: dict[str, Any]) -> None:
    """Add what transformers 5 has as rope_parameters under the names of transformers 4, whose readers would take defaults."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return
    config.setdefault("rope_theta", rope["rope_theta"])
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if "partial_rotary_factor" in rope:
        config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    if scaling.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", scaling)
