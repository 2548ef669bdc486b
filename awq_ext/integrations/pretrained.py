"""Save and load models as directories that other tools read and write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.formats import layout
from ..checkpoints.model_source import ModelSource, config_of, origin
from ..checkpoints.quantized_dir import QuantDir
from ..checkpoints.renaming import Renamed
from ..checkpoints.saved import fill_model
from ..checkpoints.write import Overwrite, check_target, parse_size, stored_bytes, write
from ..forwards.forked import finishing_after_fork
from ..modules import unwrapped
from ..reporting.readers import DEFAULT_FORMAT
from ..reporting.scores import plain_scores
from . import transformers_models as huggingface
from .beside import summary_for, write_beside
from .hub import folder_of


@finishing_after_fork
def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    format: str = DEFAULT_FORMAT,
    max_shard_size: int | str = "5GB",
    tokenizer: Any = None,
    overwrite: Overwrite = False,
    evaluations: Mapping[str, Any] | None = None,
    verify: bool = False,
) -> Path:
    """Write a quantized ``model`` to ``directory`` in a layout that other tools read; returns the directory.

    format: a name of ``awq_ext.checkpoints.formats.LAYOUTS``; docs/formats.md tells who reads which and what each can hold.
    max_shard_size: bytes, or a text such as "5GB"; beyond it there are several files and an index.
    tokenizer: anything with ``save_pretrained(directory)``, also a list of such; None takes the tokenizer and processor files of
        the directory the model came from. All other files there are copied too (code of the model, licences), but no weights and
        no pickles.
    overwrite: False refuses a directory that holds weights; True replaces a quantized checkpoint; the directory's own path replaces
        float weights too, but never those that the model was loaded from.
    evaluations: what :func:`awq_ext.evaluate` found, by the name of the text, ``{"code": awq_ext.evaluate(model, windows,
        reference=float_model)}``: for the card and the report beside the weights.
    verify: read the directory back before it is put in place, a layer at a time, and compare every tensor with the model's, bit by
        bit, and every layer that a reader makes of them (docs/formats.md). It takes two to three times as long as writing.
    A Transformers model gets its config.json and generation_config.json, any other a config.json with nothing but its class
    and quantization_config. Beside them lie the report and a model card (README.md; one that a person wrote in ``directory`` stays,
    the float model's becomes README.base.md). The directory appears whole or stays as it was, a kill at any moment included; files
    in it that are no part of a checkpoint stay.
    Raises CheckpointError, before anything is written, with a list of everything the format cannot hold and what to do about
    it; ValueError for an unknown format or size; TypeError for what are no evaluations. With ``verify`` also a CheckpointError
    that names file, tensor and layer, where what was written differs; the directory then is as it was.
    """
    return write_pretrained(model, directory, format, max_shard_size, tokenizer, overwrite, evaluations, verify=verify)


def write_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    format: str,
    max_shard_size: int | str = "5GB",
    tokenizer: Any = None,
    overwrite: Overwrite = False,
    evaluations: Mapping[str, Any] | None = None,
    spill: bool = False,
    verify: bool = False,
) -> Path:
    """Do what :func:`save_pretrained` does; with ``spill`` about one layer at a time is in memory."""
    target, limit, scores = layout(format), parse_size(max_shard_size), plain_scores(evaluations)
    model = unwrapped(model)
    allowed = partial(check_target, Path(directory), overwrite, [origin(model)])
    allowed()
    source = Renamed(ModelSource(model), model, to_files=True)
    summary = summary_for(source, model, target)

    def companions(folder: Path) -> None:
        huggingface.write_companions(model, folder, tokenizer)

    def extra(folder: Path) -> None:
        write_beside(model, folder, source, target, summary, stored_bytes(folder), Path(directory), scores)

    config = huggingface.with_local_code(config_of(model), origin(model))
    write(Path(directory), source, target, summary, config, limit, extra, companions, allowed, spill, verify)
    return Path(directory)


@finishing_after_fork
def from_pretrained(
    directory: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> nn.Module:
    """Load the model of a directory with config.json and a quantized checkpoint of any layout, in eval mode, on the CPU.

    directory: also a GGUF file by itself, whose config is made of its metadata; or a name on the Hugging Face hub,
        such as "Qwen/Qwen2.5-7B-Instruct-AWQ", whose files are taken from the cache or downloaded. revision, token, cache_dir and
        local_files_only are those of huggingface_hub, whose defaults hold otherwise (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE). Pickled
        weights are never downloaded.

    The class is the one that config.json names, of the transformers package (``pip install "awq-ext[hf]"``). Weights are built
    empty and filled shard by shard: no float copy of a quantized weight ever exists.
    dtype: of everything that is not quantized; None keeps the dtypes of the files.
    options: passed to the config, such as ``attn_implementation="eager"`` or ``trust_remote_code=True``. Code that lies beside a
        model is never run without the latter.
    The model has an ``awq_report`` where one lies beside the weights, as awq_ext writes it: not that of a GGUF file by itself, nor
    that of another tool's directory.
    Raises CheckpointError for names that cannot be found, for damaged, hostile or unfitting files, and for layouts that cannot be
    read; ImportError without transformers.
    """
    folder = folder_of(directory, revision, token, cache_dir, local_files_only)
    source = QuantDir(folder)
    model = huggingface.empty_model(folder, dtype, options)
    fill_model(model, source, dtype, huggingface.ignored(model))
    huggingface.finish(model, folder)
    return model.eval()
