"""Statistics of the inputs of a block, collected while the calibration batches stream through it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from .rare import lack_of_rows, raised
from .row_weights import Weights


class Accumulator(Protocol):
    """Sums over the rows of one input, as ``ActivationStats`` keeps them."""

    @property
    def rows(self) -> int:
        """Rows that counted."""

    def update(self, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add the rows of x [..., K], except those where ``mask`` is False; weights fp32 [rows], None: all 1."""

    def sum(self) -> Tensor:
        """Return the sum over rows of x: fp64 [K]."""

    def abs_sum(self) -> Tensor:
        """Return the sum over rows of |x|: fp64 [K]."""

    def second_moment(self) -> Tensor:
        """Return the sum over rows of x x^T: fp32 [K, K]."""


@dataclass
class InputStatistics:
    """Statistics of one input over all batches. rows_seen: rows that arrived, masked out or not."""

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

    def guide(self, around_mean: bool = False) -> Tensor:
        """Return the second moment that a search goes by, with rare channels raised (``rare.py``): fp32 [K, K].

        around_mean: whether it is the one around the mean (``centred.py``). Computed on first access.
        """
        return self._around_mean if around_mean else self._around_zero

    @cached_property
    def _around_mean(self) -> Tensor:
        moment = centred(self.stats.second_moment(), self.stats.sum(), self.rows)
        return moment if self._lack is None else raised(moment, self._lack)

    @cached_property
    def _around_zero(self) -> Tensor:
        moment = self.stats.second_moment()
        # a copy that the planned memory leaves out: of usual calibration texts no channel is rare
        return moment if self._lack is None else raised(moment.clone(), self._lack)

    @cached_property
    def _lack(self) -> Tensor | None:
        return lack_of_rows(self.rows, self.stats.abs_sum(), self.stats.second_moment().diagonal())

    @property
    def finite(self) -> bool:
        """Whether all values were finite numbers with finite squares."""
        return bool(torch.isfinite(self.stats.second_moment().diagonal()).all())


@dataclass
class GroupStatistics:
    """Statistics of the inputs of a group's Linears, by name; Linears that read the same tensor share one object.

    including_padding: names of the Linears whose rows include padding, because no mask fits them.
    """

    inputs: dict[str, InputStatistics]
    including_padding: list[str] = field(default_factory=list)

    @property
    def rows_seen(self) -> int:
        """Rows of all inputs, masked out or not."""
        return sum(one.rows_seen for one in self._distinct(self.inputs))

    @property
    def rows(self) -> int:
        """Rows of all inputs that counted."""
        return sum(one.rows for one in self._distinct(self.inputs))

    def x_mean(self, names: Iterable[str] | None = None) -> Tensor:
        """Compute the mean of |x| per channel over all rows that reached the Linears ``names`` (None: all): fp32 [K]."""
        inputs = self._distinct(self.inputs if names is None else names)
        return (sum(one.stats.abs_sum() for one in inputs) / max(sum(one.rows for one in inputs), 1)).float()

    def _distinct(self, names: Iterable[str]) -> list[InputStatistics]:
        return list({id(self.inputs[name]): self.inputs[name] for name in names}.values())


@dataclass(frozen=True, eq=False)
class Rows:
    """What arrived at an input in one call: x [..., K], which rows count (None: all), their weights fp32 [rows] (None: all 1).

    seen: how many rows arrived, masked out or not.
    """

    x: Tensor
    mask: Tensor | None
    weights: Tensor | None
    seen: int


class BlockStatistics:
    """Sums over the rows of all inputs of a block, from which the statistics of its groups are made."""

    def __init__(
        self,
        surveyed: BlockSurvey,
        device: torch.device,
        accumulator: Callable[[int, torch.device], Accumulator] = kernels.activation_stats,
    ) -> None:
        self._inputs: dict[str, InputStatistics] = {}
        self._groups = []
        for group in surveyed.groups:
            inputs: dict[str, InputStatistics] = {}
            for part in group.inputs:
                one = InputStatistics(accumulator(surveyed.linears[part[0]].in_features, device))
                inputs |= dict.fromkeys(part, one)
                self._inputs[part[0]] = one
            self._groups.append(GroupStatistics(inputs))

    def add(self, name: str, rows: Rows) -> None:
        """Add rows that arrived at the input that the Linear ``name`` is the first to read."""
        into = self._inputs[name]
        into.rows_seen += rows.seen
        into.stats.update(rows.x, rows.mask, rows.weights)

    def groups(self, including_padding: Container[str]) -> list[GroupStatistics]:
        """Return the statistics of each group. including_padding: names of all Linears whose rows include padding."""
        for group in self._groups:
            group.including_padding = [name for name in group.inputs if name in including_padding]
        return self._groups


class InputWatch:
    """Sees the rows that arrive at the inputs of a block while batches run through it.

    take: called with the name of the first Linear that reads an input, and the rows, call by call. weights: of the calibration rows
    (None: all count alike).
    """

    def __init__(self, surveyed: BlockSurvey, weights: Weights | None, take: Callable[[str, Rows], None]) -> None:
        self._surveyed, self._weights, self._take = surveyed, weights, take
        self._padding = ExpertPadding(surveyed.mixtures)
        self._whole: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch the batches that the body runs, each of which :meth:`begin` announces."""
        with Hooks() as on:
            on.enter_context(self._padding.on(norm_candidates(self._surveyed.block.module)))
            for group in self._surveyed.groups:
                for name, *_ in group.inputs:
                    see = partial(self._see, name, name in group.experts)
                    # a block's own hooks do not run on copies
                    if self._surveyed.linears[name] is self._surveyed.block.module:
                        self._whole = see
                    else:
                        on.input(self._surveyed.linears[name], see)
            yield

    def begin(self, stop: Stop) -> None:
        """Note the batch that runs next."""
        self._padding.begin(stop)
        if self._weights is not None:
            self._weights.begin(stop.call)
        if self._whole is not None:
            self._whole(*stop.inputs)

    @property
    def including_padding(self) -> Collection[str]:
        """Names of the Linears whose rows included padding so far, because no mask fits them."""
        return self._padding.including_padding

    def _see(self, name: str, expert: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = linear_input(args, kwargs)
        mask = self._padding.row_mask(name, x)
        # padding that reaches an expert does not count as seen: no token chose this expert
        seen = int(mask.sum()) if expert and mask is not None else x.numel() // x.shape[-1]
        weights = None if self._weights is None else self._weights.following(name, x)
        self._take(name, Rows(x, mask, weights, seen))


def collect(
    surveyed: BlockSurvey,
    stops: Sequence[Stop],
    device: torch.device,
    hold: bool,
    weights: Weights | None = None,
    accumulator: Callable[[int, torch.device], Accumulator] = kernels.activation_stats,
    advance: Callable[[Stop], None] = Stop.advance,
    run: Callable[[Stop], Any] = Stop.run_on_copies,
) -> tuple[list[GroupStatistics], Any]:
    """Stream every batch through the block; return the statistics of each of its groups, and the first batch's output.

    The first batch stays at the block's entry for later probes. With ``hold`` all batches do: they run the block on copies now, and
    again later, on other weights. Otherwise they move on to the next block, and the block runs once. weights: of the calibration
    rows (None: all count alike). advance: lets a batch move on. run: runs the block on copies of the first batch's arguments.
    """
    statistics = BlockStatistics(surveyed, device, accumulator)
    watch = InputWatch(surveyed, weights, statistics.add)
    with watch.on():
        watch.begin(stops[0])
        output = run(stops[0])
        free = FreeMemory()  # made once the sums are in memory, which is no growth to release
        for stop in stops[1:]:
            watch.begin(stop)
            if hold:
                stop.run_on_copies()
            else:
                advance(stop)
            free.release_if_grown()
    return statistics.groups(watch.including_padding), output
