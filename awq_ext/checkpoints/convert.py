"""Convert a quantized checkpoint from one layout to another, file to file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..forwards.forked import finishing_after_fork
from ..reporting.model_card import BASE_CARD, CARD, Card, base_of, inherited_from, read_card, write_card
from ..reporting.readers import DEFAULT_FORMAT
from ..reporting.report import AwqReport
from .formats import CheckpointError, Summary, layout
from .gguf.single import complete, directory_of
from .quantized_dir import CONFIG, QuantDir, without_settings
from .saved import found_report
from .shards import PICKLES
from .write import (
    REPORT,
    Overwrite,
    Source,
    check_target,
    is_checkpoint_file,
    parse_size,
    stored_bytes,
    summarize,
    write,
)

# in whatever form, and what a torch.save or a joblib.dump may have written
_WEIGHTS = (
    ".safetensors", *PICKLES, ".pickle", ".joblib", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".onnx.data",
    ".ot", ".npz", ".npy", ".tflite", ".mlmodel", ".engine", ".plan", ".pdparams", ".nemo",
)  # fmt: skip


@finishing_after_fork
def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    format: str = DEFAULT_FORMAT,
    max_shard_size: int | str = "5GB",
    overwrite: Overwrite = False,
    verify: bool = False,
) -> Path:
    """Write the quantized checkpoint in directory ``src`` to directory ``dst`` in another layout; returns ``dst``.

    src: any layout that :func:`awq_ext.load` reads, also a GGUF file by itself. format: a name of
        ``awq_ext.checkpoints.formats.LAYOUTS``.
    No model is built, and no weight is dequantized: codes, scales and zeros stay what they are. All other files (tokenizer,
    generation_config.json, code of the model) are copied, but no pickles.
    overwrite: False refuses a directory that holds weights; True replaces a quantized checkpoint; ``dst`` itself replaces float
        weights too.
    verify: as for :func:`awq_ext.save_pretrained`; what is compared with is read from ``src`` once more.
    Raises CheckpointError, before anything is written, for a damaged source and for one that the format cannot hold;
    ValueError for an unknown format or size.
    """
    target, limit = layout(format), parse_size(max_shard_size)
    source_folder, folder = directory_of(src), Path(dst)
    if folder.resolve() == source_folder.resolve():
        raise CheckpointError(f"{dst} is the source: convert into another directory")
    check_target(folder, overwrite)
    source = QuantDir(source_folder)
    if source.in_memory is not None and source.experts and not target.holds_memory:
        raise CheckpointError(
            f"{source_folder} holds experts under the names of a model in memory, which only that model can tell from those "
            "of files: load it and use awq_ext.save_pretrained"
        )
    summary = summarize(source, target, float_modules(source))
    complete(source_folder)
    config = without_settings(source.config)

    def extra(to: Path) -> None:
        if (source_folder / REPORT).is_file():
            shutil.copy2(source_folder / REPORT, to / REPORT)
        if (to / CARD).exists():  # if it is ours, it tells the old layout
            made = card(target.name, source, summary, config, found_report(source), base_of(to), stored_bytes(to))
            inherited, beside = inherited_from(read_card(to)), (to / BASE_CARD).exists()
            write_card(to, replace(made, inherited=inherited, base_card=beside), folder)

    allowed = partial(check_target, folder, overwrite)
    beside = partial(carry, source_folder)
    write(folder, source, target, summary, config, limit, extra, beside, allowed, verify=verify)
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
    sizes = summary.group_sizes()
    scores = report.evaluations if report is not None else {}
    parts = (len(summary.layers), sizes, summary.symmetric, report, base, before, stored)
    return Card(format, *parts, summary.widths(), scores)


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


def carry(source: Path, folder: Path, passed_over: Callable[[str], bool] = lambda name: False) -> None:
    """Copy to ``folder`` what lies beside the weights in ``source``: tokenizers, code of the model, licences, folders of such.

    passed_over: tells by name which of the files to leave. Never copied are parts of a checkpoint, weights of any kind, what may be
    a pickle, hidden files, links out of the directory, and folders with weights and a config.json: other checkpoints.
    """
    for here, folders, names in os.walk(source):
        place = Path(here)
        top = place == source
        if not top and CONFIG in names and any(name.lower().endswith(_WEIGHTS) for name in names):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        for name in names:
            ours = top and (is_checkpoint_file(name) or passed_over(name))
            if not ours and not name.startswith(".") and _may_be_copied(place / name, source):
                to = folder / place.relative_to(source) / name
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(place / name, to)


def _may_be_copied(file: Path, source: Path) -> bool:
    """Tell whether a file is no weights, no pickle by its name or first bytes, and lies where it says."""
    if file.name.lower().endswith((*_WEIGHTS, ".index.json")) or not file.is_file():
        return False
    root, real = source.resolve(), file.resolve()
    cached = root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs")
    if not real.is_relative_to(root) and not cached:
        return False
    with file.open("rb") as opened:
        start = opened.read(4)
    return not (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) and start != b"PK\x03\x04"
