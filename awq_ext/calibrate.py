"""Watching calibration forwards: a survey of the first batch, then statistics of every batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import interrupt
from .batches import Call
from .blocks import Block, Stop, copy_inputs, run_call, tensor_bytes
from .groups import ScaleGroup, Watch, linear_input, norm_candidates
from .memory import FreeMemory
from .mixture import Mixture, MixtureWatch
from .padding import ExpertPadding
from .weighting import WeightedStats, Weights

T = TypeVar("T")

# Rows and packed panels that quadratic_losses (csrc/drivers/quadratic-inl.h) works on at a time, in bytes.
_KERNEL_SLAB = 32 << 20


@dataclass(frozen=True)
class BlockSurvey:
    """A block as the first batch saw it; ``reasons``: why some of its Linears stay float; ``mixtures``: what may be experts."""

    block: Block
    linears: Mapping[str, nn.Linear]
    groups: Sequence[ScaleGroup]
    input_bytes: int
    reasons: Mapping[str, str] = field(default_factory=dict)
    mixtures: Sequence[Mixture] = ()

    @property
    def statistics_bytes(self) -> int:
        """Bytes of the block's second moments (fp32 [K, K]) and sums of x and |x| (fp64 [K]), one of each an input."""
        widths = [self.linears[part[0]].in_features for group in self.groups for part in group.inputs]
        return sum(4 * k * k + 16 * k for k in widths)

    @property
    def scratch_bytes(self) -> int:
        """Bytes that solving the block needs for a while, beside its statistics."""
        weights = [linear.weight for linear in self.linears.values()]
        moment = max((linear.in_features**2 for linear in self.linears.values()), default=0)
        trial = sum(weight.numel() * (weight.element_size() + 2 * 0.6) for weight in weights)
        # the upper triangle in fp32, and the largest Linear in fp32 while a trial weight is made of it
        largest = max((8 * weight.numel() for weight in weights), default=0)
        return int(2 * moment + trial + largest + _KERNEL_SLAB)


def survey(
    model: nn.Module,
    blocks: Sequence[Block],
    linears: Mapping[str, nn.Linear],
    call: Call,
    kind: Callable[[str], Hashable] = lambda _: None,
    mixtures: Sequence[Mixture] = (),
) -> list[BlockSurvey]:
    """Run the first batch through the whole model: the blocks in calling order, each with its scale groups.

    kind: Linears for whose names it differs are not put into one group. mixtures: what may be experts.

    A block that is called twice in one forward cannot be finished after its first call: then the whole model counts as one
    block. Raises CalibrationError when the model rejects the batch.
    """
    order: list[Block] = []
    sizes: dict[str, int] = {}
    watches = {block.name: Watch() for block in blocks}
    tokens = {
        b.name: MixtureWatch([m for m in mixtures if len(linears_of(b, m.linears)) == len(m.linears)]) for b in blocks
    }
    with ExitStack() as stack:
        for block in blocks:
            inside = linears_of(block, linears)
            norms = {f"{block.name}.{n}" if block.name else n: m for n, m in norm_candidates(block.module).items()}
            stack.enter_context(watches[block.name].on(inside, norms))
            stack.enter_context(tokens[block.name].on(norms))
            stack.enter_context(_entry_hook(block, order, sizes))
            stack.enter_context(_exit_hook(block, watches[block.name]))
        with torch.no_grad():
            # on copies: a model that writes its input must find the batch untouched when it is calibrated
            run_call(model, Call(copy_inputs(call.args), copy_inputs(call.kwargs)), 0)
    if len({block.name for block in order}) < len(order):
        return survey(model, [Block("", model)], linears, call, kind, mixtures)
    found = []
    for block in order:
        inside = linears_of(block, linears)
        groups = watches[block.name].groups(inside, kind)
        groups = tokens[block.name].join(groups, watches[block.name], inside, kind)
        reasons = tokens[block.name].reasons
        inside = {name: linear for name, linear in inside.items() if name not in reasons}
        worked_on = [mixture for mixture in tokens[block.name].mixtures if mixture.linears.keys() & inside.keys()]
        found.append(BlockSurvey(block, inside, groups, sizes[block.name], reasons, worked_on))
    return found


def linears_of(block: Block, linears: Mapping[str, T]) -> dict[str, T]:
    """Those of ``linears`` that are the block or lie below it."""
    prefix = f"{block.name}." if block.name else ""
    return {name: module for name, module in linears.items() if name == block.name or name.startswith(prefix)}


@contextmanager
def _entry_hook(block: Block, order: list[Block], sizes: dict[str, int]) -> Iterator[None]:
    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        interrupt.check()
        order.append(block)
        sizes[block.name] = tensor_bytes((args, kwargs))

    hook = block.module.register_forward_pre_hook(entered, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _exit_hook(block: Block, watch: Watch) -> Iterator[None]:
    hook = block.module.register_forward_hook(lambda *_: watch.release())
    try:
        yield
    finally:
        hook.remove()


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

    untold: those whose rows include padding, because no mask fits them.
    """

    inputs: dict[str, InputStatistics]
    untold: list[str] = field(default_factory=list)

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

    The first batch stays at the block's entry for later probes; with ``hold`` all of them do (they rehearse the block and run
    it again later, on other weights), otherwise they move on to the next block, and the block runs once. weights: by which rows
    count (None: all alike).
    """
    books = []
    padding = ExpertPadding(surveyed.mixtures)

    def feed(book: InputStatistics, name: str, expert: bool, x: Tensor) -> None:
        mask = padding.row_mask(name, x)
        # an expert that only padding chose is one that no token chose
        book.rows_seen += int(mask.sum()) if expert and mask is not None else x.numel() // x.shape[-1]
        book.stats.update(x, mask, *(() if weights is None else (weights.following(name, x),)))

    def begin(stop: Stop) -> None:
        padding.begin(stop)
        if weights is not None:
            weights.begin(stop.call)

    with ExitStack() as stack:
        stack.enter_context(padding.on(norm_candidates(surveyed.block.module)))
        for group in surveyed.groups:
            inputs: dict[str, InputStatistics] = {}
            for part in group.inputs:
                leader = surveyed.linears[part[0]]
                stats = _new_statistics(kernels, leader.in_features, device)
                book = InputStatistics(stats if weights is None else WeightedStats(stats))
                inputs |= dict.fromkeys(part, book)
                told = (book, part[0], part[0] in group.experts)
                hook = leader.register_forward_pre_hook(
                    lambda _, args, kwargs, told=told: feed(*told, linear_input(args, kwargs)), with_kwargs=True
                )
                stack.callback(hook.remove)
            books.append(GroupStatistics(inputs))
        begin(stops[0])
        output = stops[0].rehearse()
        free = FreeMemory()  # the sums have their pages by now
        for stop in stops[1:]:
            begin(stop)
            if hold:
                stop.rehearse()
            else:
                stop.advance()
            free.release_if_grown()
    for group in books:
        group.untold = [name for name in group.inputs if name in padding.untold]
    return books, output


def _new_statistics(kernels: ModuleType, in_features: int, device: torch.device) -> Any:
    if device.type == "cpu":
        return kernels.ActivationStats(in_features)
    return kernels.ActivationStats(in_features, device=device)
