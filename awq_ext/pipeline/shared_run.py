"""The steps of one quantize() call that several processes make together: batches by process, blocks by process.

Batch i runs in process i mod n, through the next n blocks at a time (one, where blocks are calibrated on quantized ones). Process k
gets all that arrived at the inputs of block k of these, adds it up in the order of the batches, which is that of one process, and
solves this block. Then all of them take over the results. So every sum and every code is that of one process, to the last bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from ..calibration.padding import warnings_for
from ..calibration.statistics import BlockStatistics, InputWatch
from ..distributed.inputs import InputRecord, unpacked
from ..distributed.parcel import pack
from ..folding.finder import FoldFinder
from ..folding.fold import Fold
from ..forwards.calls import Call
from ..forwards.lockstep import Worker, refuse_returns
from ..forwards.memory import FreeMemory, release_free_memory
from ..reporting.progress import say
from ..reporting.tables import format_bytes
from ..survey.survey import BlockSurvey
from ..workdir.result import BlockResult
from .run import Block, Collected, Run
from .shared_keeping import SharedKeeping, received

# Blocks that are worked on at a time, one for each process, with their places among all blocks.
Window = Sequence[tuple[int, BlockSurvey]]


class _OrderedFinder(FoldFinder):
    """Finds the folds of a block once those of the blocks before it are found, as one process does."""

    def __init__(self, norms: Mapping[str, nn.Module]) -> None:
        super().__init__(norms)
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[Any], None] = lambda pattern: None

    def find(self, probe: Any, groups: Any, linears: Any, wanted: Any) -> list[Fold | None]:
        """As the finder of one process."""
        self.before()
        folds = super().find(probe, groups, linears, wanted)
        self.after(self.remembered(groups, linears, wanted))
        return folds


class SharedRun(Run):
    """The part of one process in a quantize() call that several make."""

    _keeping: SharedKeeping
    _finder: _OrderedFinder
    _kind_of_finder = _OrderedFinder

    def __init__(self, opened: Any, surveys: Any, report: Any, progress: bool, rescaling: Any, keeping: Any) -> None:
        self._team = keeping.team
        if steps := opened.config.learn_rounding:
            raise ValueError(
                f"learn_rounding={steps} needs all calibration batches in one process, and {self._team.size} work together: "
                'set learn_rounding=0 (effort="best" sets another), or distributed=False'
            )
        keeping.find_held(surveys)
        super().__init__(opened, surveys, report, progress and self._team.leads, rescaling, keeping)
        self._order = [one.block for one in surveys]
        self._everyone = keeping.everyone_needs(opened.config)

    def held_calls(self) -> list[Call]:
        """Return the first batch, on which folds and clips are tried, and the own ones."""
        return [self._calls[0], *self._calls[self._team.rank :: self._team.size]]

    def all_blocks(self) -> None:
        """Lead the model through all blocks, some at a time."""
        with ExitStack() as stack:
            workers: list[Worker] = []
            if not self._keeping.has_all(self._surveys):
                mine = range(self._team.rank, len(self._calls), self._team.size)
                # a model that writes its input must find it untouched when it is calibrated
                numbered = [(0, self._calls[0].on_copies()), *((i, self._calls[i]) for i in mine)]
                workers = stack.enter_context(self._session.forwards(self._surveys, numbered, self._keeping.waits))
                for worker in workers:
                    worker.advance()
            bar = stack.enter_context(self._bar())
            for window in self._windows():
                bar.note(
                    f"{window[0][1].block.name or 'whole model'}, peak {format_bytes(self._session.memory.bytes())}"
                )
                release_free_memory()
                for worker in workers:
                    self._advance_to(worker, window[0][0])
                for (index, surveyed), result in zip(window, self._results(window, workers), strict=True):
                    if result is not None:
                        block = Block(index, surveyed, [], True)
                        self.swap(block, result)
                        self.finished(block, result)
                    bar.update()
        self._report.warnings += warnings_for(self._padded)
        self._tell_what_was_sent()

    def _tell_what_was_sent(self) -> None:
        everyones = self._team.gathered(self._team.moved)
        if self._progress:
            sums = {what: sum(one.get(what, 0) for one in everyones) for one in everyones for what in one}
            told = ", ".join(f"{format_bytes(count)} of {what}" for what, count in sums.items())
            say(f"{self._team.size} processes sent each other {told}")

    def _windows(self) -> Iterator[Window]:
        """Yield blocks to be worked on together: finished ones alone, others as many as there are processes."""
        most = 1 if self._session.config.propagate == "quantized" else self._team.size
        window: list[tuple[int, BlockSurvey]] = []
        for index, surveyed in enumerate(self._surveys):
            if not surveyed.groups:
                continue
            if window and (self._keeping.holds(index) or self._keeping.holds(window[-1][0]) or len(window) == most):
                yield window
                window = []
            window.append((index, surveyed))
        if window:
            yield window

    def _results(self, window: Window, workers: Sequence[Worker]) -> list[BlockResult | None]:
        """Find what takes the place of each block's Linears; None where this process does not need it."""
        if self._keeping.holds(window[0][0]):
            ((index, surveyed),) = window
            result = self.stored(Block(index, surveyed, [], True))
            if not self._holds_back(index):  # through the float block, before its layers are swapped
                for worker in workers:
                    self._advance_to(worker, index + 1)
            return [result if self._everyone or self._team.leads else None]
        collected = self._collect_window(window, workers[1:])
        solved = self._solve_mine(window, collected, workers[0])
        return [self._shared(k, index, one, solved) for k, (index, one) in enumerate(window)]

    def _collect_window(self, window: Window, workers: Sequence[Worker]) -> Collected | None:
        """Run the own batches through all blocks of the window; return the statistics of the own block, if there is one."""
        start, rank = time.perf_counter(), self._team.rank
        mine = BlockStatistics(window[rank][1], self._session.device) if rank < len(window) else None
        records = {index: InputRecord() for index, _ in window}
        watches = {i: InputWatch(one, self._weights, records[i].take) for i, one in window}
        padded: set[str] = set()
        free = FreeMemory()
        with ExitStack() as stack:
            for watch in watches.values():
                stack.enter_context(watch.on())
            for turn in range(-(-len(self._calls) // self._team.size)):
                if turn < len(workers):
                    self._run_through(workers[turn], watches)
                parcels = [records[index].packed(watches[index].including_padding) for index, _ in window]
                parcels += [pack({})] * (self._team.size - len(window))
                for parcel in self._team.exchange(parcels, "inputs"):
                    if mine is not None:
                        rows, names = unpacked(parcel, self._session.device)
                        padded.update(names)
                        for name, one in rows:
                            mine.add(name, one)
                free.release_if_grown()
        seconds = (time.perf_counter() - start) / len(window)
        return None if mine is None else Collected(mine.groups(padded), None, seconds)

    def _run_through(self, worker: Worker, watches: Mapping[int, InputWatch]) -> None:
        """Run a batch through the blocks that are watched, to the entry of the one behind them if it may move on."""
        last = max(watches)
        while worker.stop is not None and (place := self._place(worker)) <= last:
            if place in watches:
                watches[place].begin(worker.stop)
            if place == last and self._holds_back(place):
                worker.stop.run_on_copies()
                return
            self._advance(worker)

    def _solve_mine(self, window: Window, collected: Collected | None, replica: Worker) -> BlockResult | None:
        """Solve the own block of the window, if there is one, on the first batch; then let that move on behind the window."""
        result = None
        if collected is not None:
            index, surveyed = window[self._team.rank]
            self._advance_to(replica, index)
            assert replica.stop is not None, "the first batch calls every block"
            output = replica.stop.run_on_copies()
            self._finder.before = partial(self._learn_folds, window[: self._team.rank])
            self._finder.after = lambda pattern: self._team.post(f"folds {index}", json.dumps(pattern))
            own = Block(index, surveyed, [replica.stop], self._holds_back(index))
            result = self.solve(own, Collected(collected.statistics, output, collected.seconds))
        last = window[-1][0]
        self._advance_to(replica, last if self._holds_back(last) else last + 1)
        return result

    def _learn_folds(self, before: Window) -> None:
        """Go on from the folds that other processes found in the blocks ``before`` the own one."""
        for index, surveyed in before:
            pattern = json.loads(self._team.read(f"folds {index}"))
            self._finder.remember(*self._folds_of(Block(index, surveyed, [], True)), pattern)

    def _shared(self, owner: int, index: int, surveyed: BlockSurvey, solved: BlockResult | None) -> BlockResult | None:
        """Take over what process ``owner`` found for a block, and keep it."""
        own = solved if owner == self._team.rank else None
        block = Block(index, surveyed, [], True)
        parcel = self._team.from_one(owner, lambda: pack(*own.stored()), "layers", self._everyone)
        if not (self._everyone or self._team.leads):
            return None
        result = received(parcel, surveyed) if own is None else own
        self._finder.remember(*self._folds_of(block), result.pattern)
        return self.keep(block, result)

    def _holds_back(self, place: int) -> bool:
        """Tell whether batches wait at a block until its layers are swapped, or for ever at the last one."""
        return place == len(self._order) - 1 or self._session.config.propagate == "quantized"

    def _place(self, worker: Worker) -> int:
        assert worker.stop is not None
        return next(i for i, block in enumerate(self._order) if block is worker.stop.block)

    def _advance_to(self, worker: Worker, place: int) -> None:
        """Let a batch move on to the entry of the block at this place, or behind it where it does not call that one."""
        while worker.stop is not None and self._place(worker) < place:
            self._advance(worker)

    def _advance(self, worker: Worker) -> None:
        passed = self._place(worker) + 1
        worker.advance()
        refuse_returns(self._order[:passed], [worker])
