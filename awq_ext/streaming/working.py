"""A model on its way to a directory: loaded whole where it fits into memory, else mapped; gone on with after an interrupt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import configured
from ..pipeline.keeping import Keeping
from ..pipeline.quantize import quantize_in
from ..workdir.directory import WorkDirectory, opened
from .checkpoint import quantize_streamed, streamed, work_folder
from .limits import float_bytes


@dataclass(frozen=True, eq=False)
class Working:
    """The float model of a directory, and the work directory of what is made of it. limit: bytes of memory; None: not known."""

    model: nn.Module
    work: WorkDirectory
    streamed: bool
    limit: int | None

    def quantize(self, samples: Iterable[Any], settings: Mapping[str, Any]) -> nn.Module:
        """Quantize the model in place; settings: fields of AwqConfig."""
        config = configured(None, settings)
        if self.streamed:
            return quantize_streamed(self.model, samples, config, self.work, self.limit)
        return quantize_in(Keeping(self.work), self.model, samples, config)


def fits(source: Path, limit: int | None) -> bool:
    """Tell whether the weights of a directory fit into ``limit`` bytes of memory; yes where that is not known."""
    return limit is None or float_bytes(source) <= limit


@contextmanager
def working(
    source: Path,
    target: Path,
    load: Callable[[], nn.Module],
    limit: int | None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    fresh: bool = False,
) -> Iterator[Working]:
    """Open the model of ``source`` to make ``target`` of it: by ``load`` where it fits into ``limit`` bytes, else mapped.

    All else as for :func:`awq_ext.quantize_checkpoint`, whose errors these are.
    """
    if fits(source, limit):
        with opened(work_folder(target), fresh) as work:
            yield Working(load(), work, False, limit)
        return
    with streamed(source, target, dtype, trust_remote_code, fresh=fresh) as (model, work):
        yield Working(model, work, True, limit)
