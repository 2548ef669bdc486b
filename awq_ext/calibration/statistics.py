"""Statistics of the inputs of a block, collected while the calibration batches stream through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import kernels
from ..forwards.hooks import Hooks
from ..forwards.inputs import linear_input
from ..forwards.lockstep import Stop
from ..forwards.memory import FreeMemory
from ..modules import norm_candidates
from ..survey.survey import BlockSurvey
from .centred import centred
from .padding import ExpertPadding
from .row_weights import WeightedStats, Weights


class Accumulator(Protocol):
    """Sums over the rows of one input, as ``ActivationStats`` keeps them."""

    @property
    def rows(self) -> int:
        """Rows that counted."""

    def update(self, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add the rows of x [..., K], but for those where ``mask`` is False; weights fp32 [rows], None: all 1."""

    def sum(self) -> Tensor:
        """Sum over rows of x: fp64 [K]."""

    def abs_sum(self) -> Tensor:
        """Sum over rows of |x|: fp64 [K]."""

    def second_moment(self) -> Tensor:
        """Sum over rows of x x^T: fp32 [K, K]."""


@dataclass
class InputStatistics:
    """What one input was over all batches; rows_seen: rows that came, masked out or not."""

    stats: Accumulator
    rows_seen: int = 0

    @property
    def rows(self) -> int:
        """Rows that counted: seen and not masked out."""
        return int(self.stats.rows)

    @property
    def mean(self) -> Tensor:
        """Mean of x over the rows that counted: fp64 [K]."""
        return self.stats.sum() / max(self.rows, 1)

    @property
    def second_moment(self) -> Tensor:
        """X^T X: fp32 [K, K]."""
        return self.stats.second_moment()

    @cached_property
    def around_mean(self) -> Tensor:
        """X^T X around the mean (``centred``): fp32 [K, K], made when first asked for."""
        return centred(self.stats.second_moment(), self.stats.sum(), self.rows)

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
    device: torch.device,
    hold: bool,
    weights: Weights | None = None,
    accumulator: Callable[[int, torch.device], Accumulator] = kernels.activation_stats,
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
                stats = accumulator(leader.in_features, device)
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
