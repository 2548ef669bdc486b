"""Statistics of the inputs of a block, collected while the calibration batches stream through it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..forwards.hooks import Hooks
from ..forwards.inputs import linear_input
from ..forwards.lockstep import Stop
from ..forwards.memory import FreeMemory
from ..modules import norm_candidates
from ..survey.survey import BlockSurvey
from .padding import ExpertPadding
from .row_weights import WeightedStats, Weights


@dataclass
class InputStatistics:
    """What one input was over all batches. ``centred``: around its mean (``bias.CentredStats``), which a bias will take care of."""

    stats: Any
    rows_seen: int = 0
    centred: bool = False

    @property
    def rows(self) -> int:
        """Rows that counted: seen and not masked out."""
        return int(self.stats.rows)

    @property
    def mean(self) -> Tensor:
        """Mean of x over the rows that counted: fp64 [K]."""
        return self.stats.sum() / max(self.rows, 1)

    @property
    def finite(self) -> bool:
        """Whether no NaN or Inf was among them, nor a number whose square is none."""
        return bool(torch.isfinite(self.stats.second_moment().diagonal()).all())


@dataclass
class GroupStatistics:
    """What the inputs of a group's Linears were, by name of the Linear: one object for those that read the same tensor.

    including_padding: those whose rows include padding, because no mask fits them.
    """

    inputs: dict[str, InputStatistics]
    including_padding: list[str] = field(default_factory=list)

    @property
    def rows_seen(self) -> int:
        """Rows of all inputs, masked out or not."""
        return sum(book.rows_seen for book in self._distinct(self.inputs))

    @property
    def rows(self) -> int:
        """Rows of all inputs that counted."""
        return sum(book.rows for book in self._distinct(self.inputs))

    def x_mean(self, names: Iterable[str] | None = None) -> Tensor:
        """Mean of |x| per channel over all rows that came to the Linears called ``names`` (None: all): fp32 [K]."""
        books = self._distinct(self.inputs if names is None else names)
        return (sum(b.stats.abs_sum() for b in books) / max(sum(b.rows for b in books), 1)).float()

    def _distinct(self, names: Iterable[str]) -> list[InputStatistics]:
        return list({id(self.inputs[name]): self.inputs[name] for name in names}.values())


def collect(
    surveyed: BlockSurvey,
    stops: Sequence[Stop],
    kernels: ModuleType,
    device: torch.device,
    hold: bool,
    weights: Weights | None = None,
) -> tuple[list[GroupStatistics], Any]:
    """Stream every batch through the block into statistics, one for each of its groups; and the first batch's output.

    The first batch stays at the block's entry for later probes; with ``hold`` all of them do (they run the block on copies, and
    again later, on other weights), otherwise they move on to the next block, and the block runs once. weights: by which rows
    count (None: all alike).
    """
    books = []
    padding = ExpertPadding(surveyed.mixtures)

    def feed(book: InputStatistics, name: str, expert: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = linear_input(args, kwargs)
        mask = padding.row_mask(name, x)
        # an expert that only padding chose is one that no token chose
        book.rows_seen += int(mask.sum()) if expert and mask is not None else x.numel() // x.shape[-1]
        book.stats.update(x, mask, *(() if weights is None else (weights.following(name, x),)))

    def begin(stop: Stop) -> None:
        padding.begin(stop)
        if weights is not None:
            weights.begin(stop.call)

    with Hooks() as on:
        on.enter_context(padding.on(norm_candidates(surveyed.block.module)))
        for group in surveyed.groups:
            inputs: dict[str, InputStatistics] = {}
            for part in group.inputs:
                leader = surveyed.linears[part[0]]
                stats = _new_statistics(kernels, leader.in_features, device)
                book = InputStatistics(stats if weights is None else WeightedStats(stats))
                inputs |= dict.fromkeys(part, book)
                on.input(leader, partial(feed, book, part[0], part[0] in group.experts))
            books.append(GroupStatistics(inputs))
        begin(stops[0])
        output = stops[0].run_on_copies()
        free = FreeMemory()  # the sums have their pages by now
        for stop in stops[1:]:
            begin(stop)
            if hold:
                stop.run_on_copies()
            else:
                stop.advance()
            free.release_if_grown()
    for group in books:
        group.including_padding = [name for name in group.inputs if name in padding.including_padding]
    return books, output


def _new_statistics(kernels: ModuleType, in_features: int, device: torch.device) -> Any:
    if device.type == "cpu":
        return kernels.ActivationStats(in_features)
    return kernels.ActivationStats(in_features, device=device)
