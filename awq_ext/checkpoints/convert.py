"""convert(): a quantized checkpoint in one layout to the same one in another, file to file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .formats import LAYOUTS, CheckpointError, PackedLinear, Settings, layout
from .index import INDEX_NAME, read_index
from .quantized_dir import CONFIG, QuantDir
from .shards import PICKLES, Shards, first_json
from .write import is_checkpoint_file, parse_size, summarize, write


def convert(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], format: str = "awq", max_shard_size: int | str = "5GB"
) -> Path:
    """Write the quantized checkpoint in directory ``src`` to directory ``dst`` in another layout; returns ``dst``.

    src: any layout that :func:`awq_ext.load` reads. format: a name of ``awq_ext.formats.LAYOUTS``.
    No model is built, and no weight is dequantized: codes, scales and zeros stay what they are. All other files (tokenizer,
    generation_config.json) are copied.
    Raises CheckpointError, before anything is written, for a damaged source and for one that the format cannot hold;
    ValueError for an unknown format or size.
    """
    target, limit = layout(format), parse_size(max_shard_size)
    source_folder, folder = Path(src), Path(dst)
    if folder.resolve() == source_folder.resolve():
        raise CheckpointError(f"{dst} is the source: convert into another directory")
    source = SavedDir(source_folder) if (source_folder / INDEX_NAME).exists() else QuantDir(source_folder)
    summary = summarize(source, target, float_modules(source))
    config = {key: value for key, value in source.config.items() if key not in ("compression_config",)}
    write(folder, source, target, summary, config, limit, lambda to: _copy_rest(source_folder, to))
    return folder


class SavedDir:
    """A checkpoint that ``awq_ext.save`` wrote, layer by layer; the interface of QuantDir."""

    experts: Mapping[str, str] = MappingProxyType({})

    def __init__(self, folder: Path) -> None:
        index = read_index(folder)
        if index.get("experts"):
            raise CheckpointError(
                f"{folder} holds experts under the names of a model in memory, which only that model can tell from those of "
                "files: load it and use awq_ext.save_pretrained"
            )
        self.folder = folder
        self.config = first_json(folder, CONFIG) or {}
        self.shards = Shards(folder, [index["tensors"]])
        native = LAYOUTS["native"]
        known = {*native.suffixes, *native.optional}
        entries = {name: _sizes(name, entry) for name, entry in index["layers"].items()}
        self.settings = Settings((), entries)
        modules = self.shards.leaves()
        self.layers = {
            name: {leaf: tensor for leaf, tensor in modules.get(name, {}).items() if leaf in known} for name in entries
        }
        taken = {tensor for leaves in self.layers.values() for tensor in leaves.values()}
        self.floats = [name for name in self.shards if name not in taken]

    def layer(self, name: str) -> PackedLinear:
        """One quantized Linear."""
        tensors = {leaf: self.shards.get(tensor) for leaf, tensor in self.layers[name].items()}
        try:
            return LAYOUTS["native"].unpack(tensors, self.settings.of(name))
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: layer {name}: {error}") from None

    outline = layer  # its tensors must all be read to be checked

    def float_tensor(self, name: str) -> Tensor:
        """One of ``floats``."""
        return self.shards.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of ``floats``."""
        return self.shards.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of one of ``floats``."""
        return self.shards.dtype(name)


def _sizes(name: str, entry: Any) -> tuple[int, int]:
    sizes = (entry.get("in_features"), entry.get("group_size")) if isinstance(entry, dict) else ()
    if not sizes or not all(type(size) is int for size in sizes) or sizes[0] < 1 or (sizes[1] < 1 and sizes[1] != -1):
        raise CheckpointError(f"the entry of layer {name!r} is damaged: {entry!r}")
    return sizes


def float_modules(source: QuantDir | SavedDir) -> Iterable[str]:
    """Modules with a two-dimensional float weight: all Linears left float are among them; without a model nobody knows more.

    A head that is tied to the embedding is in no file, but is a Linear that readers must leave alone.
    """
    names = [
        name.removesuffix(".weight")
        for name in source.floats
        if name.endswith(".weight") and len(source.shape(name)) == 2 and source.dtype(name).is_floating_point
    ]
    return names if "lm_head" in (*names, *source.layers) else [*names, "lm_head"]


def _copy_rest(source: Path, folder: Path) -> None:
    """Whatever lies beside the checkpoint and is no checkpoint itself."""
    for file in source.iterdir():
        weights = (
            is_checkpoint_file(file.name) or file.suffix in (".safetensors", *PICKLES) or "index.json" in file.name
        )
        if file.is_file() and not weights and not file.name.startswith("."):
            shutil.copy2(file, folder / file.name)
