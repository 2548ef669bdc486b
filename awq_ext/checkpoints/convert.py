"""Convert a quantized checkpoint from one layout to another, file to file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import AwqConfig
from ..reporting.model_card import CARD, Card, base_of, write_card
from ..reporting.readers import DEFAULT_FORMAT
from ..reporting.report import AwqReport
from .formats import CheckpointError, Summary, layout
from .quantized_dir import QuantDir
from .saved import found_report
from .shards import PICKLES
from .write import REPORT, Source, is_checkpoint_file, parse_size, summarize, write


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    format: str = DEFAULT_FORMAT,
    max_shard_size: int | str = "5GB",
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
    source = QuantDir(source_folder)
    if source.in_memory is not None and source.experts and not target.holds_memory:
        raise CheckpointError(
            f"{source_folder} holds experts under the names of a model in memory, which only that model can tell from those "
            "of files: load it and use awq_ext.save_pretrained"
        )
    summary = summarize(source, target, float_modules(source))
    config = {key: value for key, value in source.config.items() if key not in ("compression_config",)}

    def extra(to: Path) -> None:
        _copy_rest(source_folder, to)
        if (to / CARD).exists():  # if it is ours, it tells the old layout
            stored = sum(file.stat().st_size for file in to.glob("*.safetensors"))
            write_card(
                to, card(target.name, source, summary, config, found_report(source), base_of(to), stored), folder
            )

    write(folder, source, target, summary, config, limit, extra)
    return folder


def card(
    format: str,
    source: Source,
    summary: Summary,
    config: Mapping[str, Any],
    report: AwqReport | None,
    base: str,
    stored: int,
) -> Card:
    """Collect what the model card tells. base: the float model's name; stored: bytes of the weights that are written."""
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    floats = sum(torch.Size(source.shape(name)).numel() * source.dtype(name).itemsize for name in source.floats)
    before = floats + dtype.itemsize * sum(facts.in_features * facts.out_features for facts in summary.layers.values())
    sizes, usual = summary.group_sizes(), AwqConfig().to_dict()
    return Card(format, len(summary.layers), sizes, summary.symmetric, report, base, before, stored, usual)


def float_modules(source: QuantDir) -> Iterable[str]:
    """Name the modules with a two-dimensional float weight: without a model nobody knows which of them are Linears.

    A head that is tied to the embedding is in no file, but is a Linear that readers must leave alone.
    """
    names = [
        name.removesuffix(".weight")
        for name in source.floats
        if name.endswith(".weight") and len(source.shape(name)) == 2 and source.dtype(name).is_floating_point
    ]
    return names if "lm_head" in (*names, *source.layers) else [*names, "lm_head"]


def _copy_rest(source: Path, folder: Path) -> None:
    """Copy whatever lies beside the checkpoint and is no checkpoint itself, and the report."""
    for file in source.iterdir():
        weights = (
            is_checkpoint_file(file.name) or file.suffix in (".safetensors", *PICKLES) or "index.json" in file.name
        )
        if file.is_file() and (not weights or file.name == REPORT) and not file.name.startswith("."):
            shutil.copy2(file, folder / file.name)
