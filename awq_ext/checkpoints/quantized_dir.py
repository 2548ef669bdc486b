"""QuantDir: a directory with a quantized checkpoint of any layout, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .formats import LAYOUTS, CheckpointError, Layout, PackedLinear, Settings
from .shards import Shards, first_json

CONFIG = "config.json"
# older homes of what is quantization_config in config.json now
OTHER_CONFIGS = ("quant_config.json", "quantize_config.json", "hf_quant_config.json")
# leaves that float modules have too
COMMON_LEAVES = {"weight", "bias"}


class QuantDir:
    """``layers``: quantized module -> its tensors by suffix; ``floats``: all other tensor names; ``config``: config.json.

    CheckpointError when the directory is damaged, holds pickles, or is of no layout that can be read.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.folder = Path(directory)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a directory")
        self.config: Mapping[str, Any] = first_json(self.folder, CONFIG) or {}
        self.shards = Shards(self.folder)
        modules = self.shards.leaves()
        kinds = {
            name: {leaf: self.shards.dtype(tensor) for leaf, tensor in leaves.items()}
            for name, leaves in modules.items()
        }
        self.layout, self.settings = self._recognize(kinds)
        known = {*self.layout.suffixes, *self.layout.optional}
        self.layers: dict[str, dict[str, str]] = {
            name: {leaf: tensor for leaf, tensor in leaves.items() if leaf in known}
            for name, leaves in modules.items()
            if self.layout.claims(kinds[name])
        }
        taken = {tensor for leaves in self.layers.values() for tensor in leaves.values()}
        self.floats = [name for name in self.shards if name not in taken]
        self.experts = self.settings.experts
        self._check()

    def layer(self, name: str) -> PackedLinear:
        """One quantized Linear, read and checked; CheckpointError naming it."""
        tensors = {leaf: self.shards.get(tensor) for leaf, tensor in self.layers[name].items()}
        try:
            return self.layout.unpack(tensors, self.settings.of(name))
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: layer {name}: {error}") from None

    outline = layer  # its tensors must all be read to be checked

    def rows(self, name: str) -> int:
        """out_features of a layer, from the headers."""
        leaf, dimension = self.layout.rows_at
        shape = self.shards.shape(self.layers[name][leaf]) if leaf in self.layers[name] else ()
        if len(shape) != 2:
            raise CheckpointError(f"{self.folder}: layer {name} has no {leaf} of two dimensions")
        return shape[dimension]

    def float_tensor(self, name: str) -> Tensor:
        """One of ``floats``."""
        return self.shards.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of ``floats``."""
        return self.shards.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of one of ``floats``."""
        return self.shards.dtype(name)

    def quantization_config(self) -> Mapping[str, Any] | None:
        """What the directory says of its quantization, from wherever that is written; None if nowhere."""
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, dict) else {}):
            for key in ("quantization_config", "compression_config"):
                if (found := config.get(key)) is not None:
                    if not isinstance(found, dict):
                        raise CheckpointError(f"{self.folder / CONFIG} is damaged: {key} is no object")
                    return found
        return first_json(self.folder, *OTHER_CONFIGS)

    def _recognize(self, kinds: Mapping[str, Mapping[str, torch.dtype]]) -> tuple[Layout, Settings]:
        config = self.quantization_config()
        # the one layout whose own tool writes no config
        bare = LAYOUTS["llm-awq"]
        if any(bare.claims(leaves) for leaves in kinds.values()):
            return bare, (bare.reads(config) if config else None) or Settings(())
        if config is None:
            raise CheckpointError(
                f"{self.folder} has no quantization_config: it is a float checkpoint, or one of another tool; "
                f"what can be read: {', '.join(LAYOUTS)}"
            )
        for layout in LAYOUTS.values():
            if (settings := layout.reads(config)) is not None:
                return layout, settings
        shown = {key: config[key] for key in ("quant_method", "version", "format", "quant_algo") if key in config}
        raise CheckpointError(f"{self.folder} is quantized as {shown}; what can be read: {', '.join(LAYOUTS)}")

    def _check(self) -> None:
        if not self.layers:
            raise CheckpointError(
                f"{self.folder} says that it is of the {self.layout.name} layout, but has no tensors of it "
                f"({', '.join(self.layout.suffixes)} of the right dtypes)"
            )
        own = {*self.layout.suffixes, *self.layout.optional} - COMMON_LEAVES
        for name in self.floats:
            if name.rpartition(".")[2] in own:
                raise CheckpointError(
                    f"{self.folder}: {name} ({self.shards.dtype(name)}) belongs to no layer of the {self.layout.name} "
                    "layout: other tensors of the layer are missing or of a wrong dtype"
                )
