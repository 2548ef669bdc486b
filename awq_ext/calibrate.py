"""Watching calibration forwards: a survey of the first batch, then statistics of every batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Call
from .blocks import Block, Stop, copy_inputs, run_call, tensor_bytes
from .groups import ScaleGroup, Watch, linear_input, norm_candidates
from .memory import release_free_memory

# Rows and packed panels that quadratic_losses (csrc/quadratic-inl.h) works on at a time, in bytes.
_KERNEL_SLAB = 32 << 20


@dataclass(frozen=True)
class BlockSurvey:
    """A block as the first batch saw it."""

    block: Block
    linears: Mapping[str, nn.Linear]
    groups: Sequence[ScaleGroup]
    input_bytes: int

    @property
    def statistics_bytes(self) -> int:
        """Bytes of the block's second moments (fp32 [K, K]) and sums of |x| (fp64 [K]), one of each a scale group."""
        widths = [self.linears[group.linears[0]].in_features for group in self.groups]
        return sum(4 * k * k + 8 * k for k in widths)

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
) -> list[BlockSurvey]:
    """Run the first batch through the whole model: the blocks in calling order, each with its scale groups.

    kind: Linears for whose names it differs are not put into one group.

    A block that is called twice in one forward cannot be finished after its first call: then the whole model counts as one
    block. Raises CalibrationError when the model rejects the batch.
    """
    order: list[Block] = []
    sizes: dict[str, int] = {}
    watches = {block.name: Watch() for block in blocks}
    with ExitStack() as stack:
        for block in blocks:
            inside = linears_of(block, linears)
            norms = {f"{block.name}.{n}" if block.name else n: m for n, m in norm_candidates(block.module).items()}
            stack.enter_context(watches[block.name].on(inside, norms))
            stack.enter_context(_entry_hook(block, order, sizes))
            stack.enter_context(_exit_hook(block, watches[block.name]))
        with torch.no_grad():
            # on copies: a model that writes its input must find the batch untouched when it is calibrated
            run_call(model, Call(copy_inputs(call.args), copy_inputs(call.kwargs)), 0)
    if len({block.name for block in order}) < len(order):
        return survey(model, [Block("", model)], linears, call, kind)
    found = []
    for block in order:
        inside = linears_of(block, linears)
        found.append(BlockSurvey(block, inside, watches[block.name].groups(inside, kind), sizes[block.name]))
    return found


def linears_of(block: Block, linears: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Those of ``linears`` that are the block or lie below it."""
    prefix = f"{block.name}." if block.name else ""
    return {name: module for name, module in linears.items() if name == block.name or name.startswith(prefix)}


@contextmanager
def _entry_hook(block: Block, order: list[Block], sizes: dict[str, int]) -> Iterator[None]:
    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
class GroupStatistics:
    """What a group's input was over all batches."""

    stats: Any
    rows_seen: int = 0

    @property
    def rows(self) -> int:
        """Rows that counted: seen and not masked out."""
        return int(self.stats.rows)

    @property
    def finite(self) -> bool:
        """Whether no NaN or Inf was among them, nor a number whose square is none."""
        return bool(torch.isfinite(self.stats.second_moment().diagonal()).all())

    @property
    def x_mean(self) -> Tensor:
        """Mean of |x| per channel: fp32 [K]."""
        return (self.stats.abs_sum() / max(self.rows, 1)).float()


def collect(
    surveyed: BlockSurvey, stops: Sequence[Stop], kernels: ModuleType, device: torch.device, hold: bool
) -> tuple[list[GroupStatistics], Any]:
    """Stream every batch through the block into statistics, one for each of its groups; and the first batch's output.

    The first batch stays at the block's entry for later probes; with ``hold`` all of them do (they rehearse the block and run
    it again later, on other weights), otherwise they move on to the next block, and the block runs once.
    """
    call = stops[0].call
    books = []

    def feed(book: GroupStatistics, x: Tensor) -> None:
        book.rows_seen += x.numel() // x.shape[-1]
        book.stats.update(x, call.row_mask(x))

    with ExitStack() as stack:
        for group in surveyed.groups:
            leader = surveyed.linears[group.linears[0]]
            book = GroupStatistics(_new_statistics(kernels, leader.in_features, device))
            books.append(book)
            hook = leader.register_forward_pre_hook(
                lambda _, args, kwargs, book=book: feed(book, linear_input(args, kwargs)), with_kwargs=True
            )
            stack.callback(hook.remove)
        output = stops[0].rehearse()
        for stop in stops[1:]:
            call = stop.call
            if hold:
                stop.rehearse()
            else:
                stop.advance()
            release_free_memory()
    return books, output


def _new_statistics(kernels: ModuleType, in_features: int, device: torch.device) -> Any:
    if device.type == "cpu":
        return kernels.ActivationStats(in_features)
    return kernels.ActivationStats(in_features, device=device)
