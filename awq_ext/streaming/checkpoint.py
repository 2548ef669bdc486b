"""quantize_checkpoint(): from a directory of float weights to a quantized one, with about one block of it in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.formats import layout
from ..checkpoints.write import Overwrite, check_target
from ..config import AwqConfig, configured
from ..distributed.launch import TIMEOUT
from ..distributed.team import Team, leads, teamed
from ..forwards.spill import can_spill
from ..integrations.foresee import check_format
from ..integrations.hub import folder_of
from ..integrations.pretrained import write_pretrained
from ..pipeline.quantize import quantize_in
from ..pipeline.shared_keeping import keeping_for
from ..reporting.progress import say
from ..reporting.readers import DEFAULT_FORMAT
from ..reporting.tables import format_bytes
from ..undo.thread_state import restoring
from ..workdir.directory import WorkDirectory, opened
from .limits import float_bytes, float_shards, memory_limit
from .mapped_model import mapped_factory, mapped_model


def work_folder(directory: str | os.PathLike[str]) -> Path:
    """Name the work directory of a quantized directory that is to be: ``OUT.partial`` beside it."""
    path = Path(os.path.abspath(directory))
    return path.with_name(f"{path.name}.partial")


@restoring
def quantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    calib: Iterable[Any],
    config: AwqConfig | Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    max_memory: int | str | None = None,
    factory: Callable[[], nn.Module] | None = None,
    format: str = DEFAULT_FORMAT,
    fresh: bool = False,
    overwrite: Overwrite = False,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    inputs: str | Callable[[Any], Any] = "all",
    blocks: Sequence[str] | None = None,
    progress: bool = True,
    distributed: bool = True,
    timeout: float = TIMEOUT,
    verify: bool = False,
    **overrides: Any,
) -> Path:
    """Quantize the float checkpoint ``src`` to the directory ``dst``, block by block: the model need not fit into memory.

    src: a Hugging Face directory or name with safetensors files, in any number; with ``factory`` any directory of safetensors files
        whose tensors are called as in the state_dict of the model that ``factory()`` builds.
    calib, config, inputs, blocks, overrides: as for :func:`awq_ext.quantize`, whose codes these are, bit for bit. Without a
        choice of ``fold``, it is "always" for formats that cannot hold scales which are applied at run time.
    tokenizer: for samples that are texts; it is not written (``src``'s own files are carried along).
    max_memory: bytes, or a text such as "12GB": what the process may take at its peak, mapped files not counted. None: 80 % of what
        is free. Beyond it the hidden states of waiting batches go to the disk; what still does not fit is an error beforehand.
    format, overwrite: as for :func:`awq_ext.save_pretrained`.
    dtype: of the float model, None for that of the checkpoint. Another one writes the weights to the disk once more.

    What is finished lies in ``dst.partial`` beside ``dst``, which vanishes once ``dst`` is there as a whole. After an interrupt of
    any kind the same call goes on after the last finished block, and makes the same files. fresh: start over.

    verify: as for :func:`awq_ext.save_pretrained`: each file's tensors, in the order they were written, are compared with those in
        ``dst.partial``, and floats with those in ``src``. The first process does it.
    distributed, timeout: as for ``quantize``. Of several processes the first one writes all files but ``dst.partial-process-1`` and
    so on, where the others keep what does not fit into their memory.
    Returns ``dst``. Raises what ``quantize`` and ``save_pretrained`` raise: CheckpointError for quantized, damaged or pickled
    (.bin) checkpoints and what ``format`` cannot hold; ResumeError for the work of another call, or of a running process;
    ValueError for too small a ``max_memory``; OSError for too small a disk.
    """
    source, target = Path(src) if factory is not None else folder_of(src), Path(dst)
    limit, chosen = memory_limit(max_memory), configured(config, overrides)
    if not layout(format).run_time_scales and _has_no_fold(config, overrides):
        chosen = configured(chosen, {"fold": "always"})
    check_target(target, overwrite, [source])
    samples = list(calib)
    arguments = {"tokenizer": tokenizer, "inputs": inputs, "blocks": blocks}
    with (
        teamed(timeout, distributed) as team,
        streamed(source, target, dtype, trust_remote_code, factory, fresh, progress, team) as (model, work),
    ):
        check_format(model, samples[:1] and samples[0], format, chosen, **arguments)
        quantize_streamed(model, samples, chosen, work, limit, team, progress=progress, **arguments)
        if leads(team):
            write_pretrained(model, target, format, overwrite=overwrite, spill=can_spill(), verify=verify)
        work.remove()
    return target


@contextmanager
def working_directory(target: Path, fresh: bool, team: Team | None) -> Iterator[WorkDirectory]:
    """Open the work directory of ``target``; in all processes of a team but the first, a place for files that vanish with it."""
    if team is None or team.leads:
        with opened(work_folder(target), fresh) as work:
            yield work
        return
    folder = work_folder(target)
    with opened(folder.with_name(f"{folder.name}-process-{team.rank}"), fresh=True) as work:
        try:
            yield work
        finally:
            work.remove()


def _has_no_fold(config: AwqConfig | Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> bool:
    named = {} if config is None or isinstance(config, AwqConfig) else config
    default = not isinstance(config, AwqConfig) or config.fold == AwqConfig().fold
    return default and "fold" not in {**named, **overrides}


@contextmanager
def streamed(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    factory: Callable[[], nn.Module] | None = None,
    fresh: bool = False,
    progress: bool = True,
    team: Team | None = None,
) -> Iterator[tuple[nn.Module, WorkDirectory]]:
    """Open the work directory of ``target``, and the model of ``source`` with its weights mapped from the files."""
    shards = float_shards(source)
    with working_directory(target, fresh, team) as work:
        if progress and leads(team):
            size = format_bytes(float_bytes(source))
            say(
                f"{size} of float weights are read from {source} as they are needed; what is finished goes to {work.folder}"
            )
        if factory is not None:
            model = mapped_factory(factory, shards, work.folder)
        else:
            model = mapped_model(shards, work.folder, dtype, {"trust_remote_code": trust_remote_code})
        yield model, work


def quantize_streamed(
    model: nn.Module,
    samples: Iterable[Any],
    config: AwqConfig,
    work: WorkDirectory,
    limit: int | None,
    team: Team | None = None,
    **options: Any,
) -> nn.Module:
    """Quantize a model of :func:`streamed` within ``limit`` bytes; options: of :func:`awq_ext.pipeline.quantize.quantize_in`."""
    return quantize_in(keeping_for(team, work, streamed=True, limit=limit), model, samples, config, **options)
