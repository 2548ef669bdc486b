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
from ..distributed.launch import TIMEOUT
from ..distributed.team import Team, leads, teamed
from ..pipeline.quantize import quantize_in
from ..pipeline.shared_keeping import keeping_for
from ..workdir.directory import WorkDirectory
from .checkpoint import quantize_streamed, streamed, working_directory
from .limits import float_bytes


@dataclass(frozen=True, eq=False)
class Working:
    """The float model of a directory, and the work directory of what is made of it.

    limit: bytes of memory; None: not known. team: the processes that work on it together; None: this one alone.
    """

    model: nn.Module
    work: WorkDirectory
    streamed: bool
    limit: int | None
    team: Team | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes the result, and tells of it."""
        return leads(self.team)

    def quantize(
        self, samples: Iterable[Any], settings: Mapping[str, Any], tokenizer: Callable[..., Any] | None = None
    ) -> nn.Module:
        """Quantize the model in place; settings: fields of AwqConfig."""
        config = configured(None, settings)
        if self.streamed:
            return quantize_streamed(self.model, samples, config, self.work, self.limit, self.team, tokenizer=tokenizer)
        # what others than the first process keep is in their memory alone
        keeping = keeping_for(self.team, self.work if self.leads else None)
        return quantize_in(keeping, self.model, samples, config, tokenizer=tokenizer)


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
    timeout: float = TIMEOUT,
) -> Iterator[Working]:
    """Open the model of ``source`` to make ``target`` of it: by ``load`` where it fits into ``limit`` bytes, else mapped.

    All else as for :func:`awq_ext.quantize_checkpoint`, whose errors these are.
    """
    with teamed(timeout) as team:
        if all(fits(source, limit) for limit in ([limit] if team is None else team.gathered(limit))):
            with working_directory(target, fresh, team) as work:
                yield Working(load(), work, False, limit, team)
            return
        with streamed(source, target, dtype, trust_remote_code, fresh=fresh, team=team) as (model, work):
            yield Working(model, work, True, limit, team)
