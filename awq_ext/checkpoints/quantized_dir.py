"""Read a directory with a quantized checkpoint of any layout, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..modules import called_head
from .formats import LAYOUTS, CheckpointError, Layout, PackedLinear, Settings
from .formats.packed import require_finite
from .gguf.file import GGUF, GgufTensors
from .gguf.single import directory_of
from .shards import Shards, first_json
from .version_1 import read_version_1

CONFIG = "config.json"
# older homes of what is quantization_config in config.json now
OTHER_CONFIGS = ("quant_config.json", "quantize_config.json", "hf_quant_config.json")
QUANTIZATION = ("quantization_config", "compression_config", "quantization")  # the last of MLX
# leaves that float modules have too
COMMON_LEAVES = {"weight", "bias"}


class QuantDir:
    """A directory with a quantized checkpoint, or a GGUF file by itself (see :func:`directory_of`).

    layers: quantized module -> its tensors by suffix; heads: those that are output layers, by their names; floats: names of all
    other tensors; config: config.json; tied: as in InMemory.

    CheckpointError when the directory is damaged, holds pickles, or is of no layout that can be read.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.folder = directory_of(directory)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a directory")
        before = self.folder.stat()
        self.config: Mapping[str, Any] = first_json(self.folder, CONFIG) or {}
        self._version_1 = read_version_1(self.folder)
        self.shards: Shards | GgufTensors = (
            GgufTensors(self.folder, self.config)
            if self._in_gguf()
            else Shards(self.folder, None if self._version_1 is None else [self._version_1.tensors])
        )
        self.layout, self.settings = self._recognize(self._dtypes(self.shards.leaves()))
        self.experts, self.in_memory = self.settings.experts, self.settings.in_memory
        if isinstance(self.shards, GgufTensors):
            self.experts = self.shards.experts()
        self.tied = {} if self.in_memory is None else self.in_memory.tied
        self.layers = self._find_layers()
        self.heads = [name for name in self.layers if called_head(name)]
        taken = {f"{name}.{leaf}".lstrip(".") for name, leaves in self.layers.items() for leaf in leaves}
        self.floats = [name for name in self.shards if name not in taken]
        self._check()
        if not os.path.samestat(before, self.folder.stat()):  # else config and tensors may be of two checkpoints
            raise CheckpointError(f"{self.folder} was replaced while it was read: read it again")

    def _in_gguf(self) -> bool:
        """Tell whether the tensors are in model.gguf: the config says so, or there is no other file that has them."""
        if not (self.folder / GGUF).exists():
            return False
        says = self.quantization_config()
        return (says is not None and says.get("quant_method") == "gguf") or not any(self.folder.glob("*.safetensors"))

    def layer(self, name: str, read: Mapping[str, Tensor] = MappingProxyType({})) -> PackedLinear:
        """Read and check one quantized Linear; CheckpointError naming it.

        read: those of its tensors, by suffix, that were read already; one that was cast since is read again.
        """
        tensors = {}
        for leaf, stored in self.layers[name].items():
            as_stored = leaf in read and read[leaf].dtype == self.shards.dtype(stored)
            tensors[leaf] = read[leaf].cpu() if as_stored else self.shards.get(stored)
        settings = self._settings_of(name)
        try:
            layer = self.layout.unpack(tensors, settings)
            require_finite(layer)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: layer {name}: {error}") from None
        return layer

    def _settings_of(self, name: str) -> Settings:
        try:
            return self.settings.of(name)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: layer {name}: {error}") from None

    outline = layer  # its tensors must all be read to be checked

    def empty_tensors(self, name: str) -> dict[str, Tensor]:
        """Make meta tensors like those of a layer that are stored under its own name, by suffix."""
        return {
            leaf: torch.empty(self.shards.shape(stored), dtype=self.shards.dtype(stored), device="meta")
            for leaf, stored in self.layers[name].items()
            if stored == f"{name}.{leaf}".lstrip(".")
        }

    def rows(self, name: str) -> int:
        """Tell out_features of a layer from the headers."""
        leaf, dimension = self.layout.rows_at
        shape = self.shards.shape(self.layers[name][leaf]) if leaf in self.layers[name] else ()
        if len(shape) < 2:
            raise CheckpointError(f"{self.folder}: layer {name} has no {leaf} of two dimensions")
        return shape[dimension]

    def bits(self, name: str) -> int:
        """Tell the width of a layer's codes from the config, or from the type of its blocks."""
        if isinstance(self.shards, GgufTensors):
            return self.shards.bits(name)
        return self.settings.bits(name)

    def float_tensor(self, name: str) -> Tensor:
        """Read one of ``floats``."""
        return self.shards.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of ``floats``, or a tensor that is tied to one."""
        return self.shards.shape(self.tied.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        """Of one of ``floats``, or a tensor that is tied to one."""
        return self.shards.dtype(self.tied.get(name, name))

    def quantization_config(self) -> Mapping[str, Any] | None:
        """Find what the directory says of its quantization, wherever that is written; None if nowhere."""
        if self._version_1 is not None:
            return self._version_1.config
        found = list(nested_settings(self.config))
        for place, value in found:
            if not isinstance(value, dict):
                raise CheckpointError(f"{self.folder / CONFIG} is damaged: {place} is no object")
        if not found:
            return first_json(self.folder, *OTHER_CONFIGS)
        if found[0][0] not in QUANTIZATION:  # of parts of the model only
            for place, value in found:
                if value != found[0][1]:
                    raise CheckpointError(
                        f"{self.folder / CONFIG}: {found[0][0]} and {place} differ; parts quantized in different ways "
                        "cannot be read"
                    )
        return found[0][1]

    def _dtypes(self, modules: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, torch.dtype]]:
        """Tell the dtypes of the tensors of each module, by suffix."""
        return {
            name: {leaf: self.shards.dtype(tensor) for leaf, tensor in leaves.items()}
            for name, leaves in modules.items()
        }

    def _find_layers(self) -> dict[str, dict[str, str]]:
        """Find the quantized modules, and the stored names of their tensors by suffix."""
        for name, stored in self.tied.items():
            if stored not in self.shards:
                raise CheckpointError(f"{self.folder}: {name} is tied to {stored!r}, which the files do not hold")
            if name in self.shards:
                raise CheckpointError(
                    f"{self.folder}: {name} is in the files, but the config says that it is {stored!r}"
                )
        modules = {
            name: {leaf: self.tied.get(tensor, tensor) for leaf, tensor in leaves.items()}
            for name, leaves in self.shards.leaves([*self.shards, *self.tied]).items()
        }
        dtypes, known = self._dtypes(modules), {*self.layout.suffixes, *self.layout.optional}
        return {
            name: {leaf: tensor for leaf, tensor in leaves.items() if leaf in known}
            for name, leaves in modules.items()
            if self.layout.claims(dtypes[name])
        }

    def _recognize(self, kinds: Mapping[str, Mapping[str, torch.dtype]]) -> tuple[Layout, Settings]:
        try:
            config = self.quantization_config()
            if isinstance(self.shards, GgufTensors):
                config = {"quant_method": "gguf"}  # which no other tool writes
            return self._recognized(kinds, config)
        except CheckpointError as error:
            named = str(self.folder) in str(error)
            raise error if named else CheckpointError(f"{self.folder}: {error}") from None

    def _recognized(
        self, kinds: Mapping[str, Mapping[str, torch.dtype]], config: Mapping[str, Any] | None
    ) -> tuple[Layout, Settings]:
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
        entries = [self.settings.per_layer] if self.settings.per_layer else []
        for names in entries if self.in_memory is None else [*entries, self.in_memory.layers]:
            if odd := sorted(names.keys() ^ self.layers.keys()):
                raise CheckpointError(
                    f"{self.folder}: layer {odd[0]!r} has tensors but no entry in the config, or the reverse"
                )
        for name in self.layers:
            self._settings_of(name)
        own = {*self.layout.suffixes, *self.layout.optional} - COMMON_LEAVES
        for name in self.floats:
            if name.rpartition(".")[2] in own:
                self._settings_of(name.rpartition(".")[0])
                raise CheckpointError(
                    f"{self.folder}: {name} ({self.shards.dtype(name)}) belongs to no layer of the {self.layout.name} "
                    "layout: other tensors of the layer are missing or of a wrong dtype"
                )


def nested_settings(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Find quantization settings in a config and the configs of its parts (text_config, llm_config, ...): place, value."""
    for key in QUANTIZATION:
        if config.get(key) is not None:
            yield f"{place}{key}", config[key]
    for key, value in config.items():
        if key not in QUANTIZATION and isinstance(value, dict):
            yield from nested_settings(value, f"{place}{key}.")


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a config without quantization settings, those of its parts included."""
    return {
        key: without_settings(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in QUANTIZATION
    }
