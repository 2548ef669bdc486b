"""save_pretrained() and from_pretrained(): models as directories that other tools read and write."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.fill import place
from ..checkpoints.formats import CheckpointError, PackedLinear, layout
from ..checkpoints.index import INDEX_NAME
from ..checkpoints.quantized_dir import QuantDir
from ..checkpoints.renaming import Renamed
from ..checkpoints.saved import load
from ..checkpoints.write import parse_size, summarize, write
from ..layers.quant_linear import QuantLinear
from ..modules import unwrapped
from . import transformers_models as huggingface


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    format: str = "awq",
    max_shard_size: int | str = "5GB",
    tokenizer: Any = None,
) -> Path:
    """Write a quantized ``model`` to ``directory`` in a layout that other tools read; returns the directory.

    format: a name of ``awq_ext.formats.LAYOUTS``; docs/formats.md tells who reads which and what each can hold.
    max_shard_size: bytes, or a text such as "5GB"; beyond it there are several files and an index.
    tokenizer: anything with ``save_pretrained(directory)``, also a list of such; None takes the tokenizer and processor files of
        the directory the model came from.
    A Transformers model gets its config.json and generation_config.json, any other a config.json with nothing but its class
    and quantization_config. The directory appears whole or stays as it was, a kill at any moment included; files in it that are
    no part of a checkpoint stay.
    Raises CheckpointError, before anything is written, with a list of everything the format cannot hold and what to do about
    it; ValueError for an unknown format or size.
    """
    target, limit = layout(format), parse_size(max_shard_size)
    model = unwrapped(model)
    source = Renamed(ModelSource(model), model, to_files=True)
    summary = summarize(source, target, source.linears(float_linears(model)))

    def extra(folder: Path) -> None:
        huggingface.write_companions(model, folder, tokenizer)

    write(Path(directory), source, target, summary, huggingface.config_of(model), limit, extra)
    return Path(directory)


def from_pretrained(directory: str | os.PathLike[str], dtype: torch.dtype | None = None, **options: Any) -> nn.Module:
    """The model of a directory with config.json and a quantized checkpoint of any layout, in eval mode, on the CPU.

    The class is the one that config.json names, of the transformers package (``pip install "awq-ext[hf]"``). Weights are built
    empty and filled shard by shard: no float copy of a quantized weight ever exists.
    dtype: of everything that is not quantized; None keeps the dtypes of the files.
    options: passed to the config, such as ``attn_implementation="eager"`` or ``trust_remote_code=True``.
    Raises CheckpointError for damaged, hostile or unfitting files, and for layouts that cannot be read; ImportError without
    transformers.
    """
    folder = Path(directory)
    if (folder / INDEX_NAME).exists():
        model = load(huggingface.empty_model(folder, dtype, options), folder)
        huggingface.finish(model, folder)
        return model.eval()
    source = QuantDir(folder)
    model = huggingface.empty_model(folder, dtype, options)
    place(model, Renamed(source, model), dtype, huggingface.ignored(model))
    huggingface.finish(model, folder)
    return model.eval()


def float_linears(model: nn.Module) -> list[str]:
    """Names of what is not quantized and has a Linear's weight: routers of experts too, which other readers have as Linears."""
    modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if not isinstance(m, nn.Embedding)}
    weights = {name: module._parameters.get("weight") for name, module in modules.items()}
    return [name for name, weight in weights.items() if weight is not None and weight.dim() == 2]


class ModelSource:
    """A quantized model, layer by layer: what a QuantDir is for files. CheckpointError when nothing is quantized."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self.layers = {name: module for name, module in modules.items() if isinstance(module, QuantLinear)}
        if not self.layers:
            raise CheckpointError(
                f"{type(model).__name__} holds no QuantLinear: quantize it first (fake-quantized models, packed=False, are "
                "ordinary float models: use their own save_pretrained)"
            )
        self._floats = _float_tensors(model)
        self.floats = list(self._floats)
        if meta := [name for name, tensor in self._floats.items() if tensor.is_meta]:
            raise CheckpointError(f"{meta[0]} is on the meta device: it has no values to save")

    def rows(self, name: str) -> int:
        """out_features of one of ``layers``."""
        return self.layers[name].out_features

    def layer(self, name: str) -> PackedLinear:
        """One QuantLinear in rows, on the CPU."""
        return replace(self.outline(name), qweight=self.layers[name].qweight.cpu())

    def outline(self, name: str) -> PackedLinear:
        """The same without its codes, which are on the meta device."""
        layer = self.layers[name]
        if layer.tiles.is_meta:
            raise CheckpointError(f"{name} is on the meta device: it has no values to save")
        bias, scale = layer.bias, layer.pre_quant_scale
        return PackedLinear(
            qweight=torch.empty(layer.out_features, (layer.in_features + 1) // 2, dtype=torch.uint8, device="meta"),
            scales=layer.scales.cpu(),
            zeros=layer.zeros.cpu(),
            in_features=layer.in_features,
            group_size=layer.group_size,
            bias=None if bias is None else bias.detach().cpu(),
            pre_quant_scale=None if scale is None else scale.cpu(),
        )

    def float_tensor(self, name: str) -> Tensor:
        """One of ``floats``."""
        return self._floats[name].detach()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of ``floats``."""
        return tuple(self._floats[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of one of ``floats``."""
        return self._floats[name].dtype


def _float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers outside the quantized layers, tied ones once, under the name files have them by.

    Not from ``state_dict``, which would turn every int4 layer into rows.
    """
    ties = huggingface.dropped_ties(model)
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear):
            continue
        kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for leaf, tensor in (module._parameters | kept).items():
            name = f"{prefix}.{leaf}".lstrip(".")
            if tensor is not None and (id(tensor) not in found or (ties(found[id(tensor)][0]) and not ties(name))):
                found[id(tensor)] = (name, tensor)
    return dict(found.values())
