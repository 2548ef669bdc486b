"""Keeping: where a run puts what it has finished, what it may hold in memory, and what it finds of a run before."""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from torch import Tensor, nn

from ..calibration.row_weights import Weights, told, weights_of
from ..config import AwqConfig
from ..forwards.calls import Call
from ..forwards.lockstep import Stop
from ..forwards.memory import PeakAnonymous
from ..forwards.spill import can_spill, spill
from ..reporting.tables import format_bytes
from ..reporting.warn import warn
from ..survey.budget import made_bytes, planned_bytes
from ..survey.survey import BlockSurvey
from ..workdir.directory import WorkDirectory
from ..workdir.fingerprint import fingerprint
from ..workdir.result import BlockResult

_MADV_PAGEOUT = 21  # linux/mman.h, since 5.4: drops clean pages, and destroys nothing


@dataclass(frozen=True)
class Before:
    """Memory when a run makes its plan, in bytes: what is held then, and what forwards of the whole model took at their peak.

    weighing: what the weights of rows will take for a while, before the first block. kept: what stays from then until the end.
    """

    held: int
    forward: int
    weighing: int = 0
    kept: int = 0

    def peak_with(self, solving: int) -> int:
        """Return the peak of all, of which one comes after another. solving: bytes that quantizing block by block takes."""
        return max(self.forward, self.held + max(self.weighing, solving)) + self.kept


class Keeping:
    """How one run keeps what it makes; without a work directory it keeps all in memory.

    streamed: the float weights are mapped from files. Their pages are given back once a block is finished, and its new layers are
    mapped from the work directory. limit: bytes of memory, mapped files not counted, that a streamed run may take; beyond it hidden
    states that wait go to files too.
    """

    def __init__(self, work: WorkDirectory | None = None, streamed: bool = False, limit: int | None = None) -> None:
        self.work, self.streamed, self._limit = work, streamed, limit
        self._started = time.perf_counter()
        self._spills = False
        self.seconds_before = 0.0  # of the runs that finished what this one found
        self.peak_before = 0

    @property
    def tells(self) -> bool:
        """Whether this process tells of the work, as one of several does."""
        return True

    @contextmanager
    def measured(self) -> Iterator[PeakAnonymous | None]:
        """Measure memory while the body runs as a streamed run counts it; None: as others do."""
        if not self.streamed:
            yield None
            return
        with PeakAnonymous() as memory:
            yield memory

    def begin(self, model: nn.Module, calls: Sequence[Call], config: AwqConfig, blocks: Sequence[str] | None) -> None:
        """Check that the work directory, if there is one, holds the work of this very call. ResumeError if not."""
        if self.work is not None:
            self.work.begin(fingerprint(model, calls, config, blocks))

    def plan(self, surveys: Sequence[BlockSurvey], growth: float, config: AwqConfig, before: Before, size: int) -> int:
        """Plan the peak of memory: what is there before, and what comes on top. Check memory and disk for it.

        size: bytes of all parameters. ValueError for more than the limit, OSError for a disk that is too small.
        """
        planned = before.peak_with(planned_bytes(surveys, growth, config, self.streamed))
        if self._limit is not None and planned > self._limit and can_spill():
            self._spills = True
            planned = before.peak_with(planned_bytes(surveys, growth, config, self.streamed, spilled=True))
        if self._limit is not None and planned > self._limit:
            raise ValueError(
                f"quantizing block by block takes about {format_bytes(planned)} of memory at its peak, and a plain forward of the "
                f"first batch {format_bytes(before.forward)}; the limit is {format_bytes(self._limit)}: give shorter or smaller "
                "calibration batches, or a larger max_memory (--max-memory)"
            )
        if self.work is not None and self.tells:
            left = [one for i, one in enumerate(surveys) if not self.holds(i)]
            room = made_bytes(left, config)
            if self.streamed:  # of which a directory is made, with what stays float
                weights = [linear.weight for one in surveys for linear in one.linears.values()]
                room += made_bytes(surveys, config) + size - sum(weight.nbytes for weight in weights)
            self.work.check_room(room, "what will be finished")
        return planned

    def remember_text(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the text that ``make`` writes, int64 [n], written once for all runs."""
        if self.work is None:
            return make()
        return self.work.remember("text", lambda: ({"text": make()}, {}))[0]["text"]

    def remember_weights(self, calls: Sequence[Call], make: Callable[[], Weights]) -> Weights:
        """Return the weights of the rows of ``calls`` that ``make`` finds, found once for all runs."""
        if self.work is None:
            return make()
        return weights_of(*self.work.remember("weights", lambda: told(make())), calls)

    def waits(self, stop: Stop) -> None:
        """Move the hidden states of a batch that begins to wait to files, if memory is short."""
        if not self._spills or self.work is None:
            return
        try:
            spill(stop.inputs, self.work.folder)
        except OSError as error:
            self._spills = False
            warn(f"hidden states stay in memory from here on, beyond the limit: {self.work.folder}: {error}")

    def has_all(self, surveys: Sequence[BlockSurvey]) -> bool:
        """Tell whether every block is finished, so that no batch need run."""
        return all(self.holds(index) for index, one in enumerate(surveys) if one.groups)

    def holds(self, index: int) -> bool:
        """Tell whether the block of this number is finished, and on the disk."""
        return self.work is not None and self.work.has(_name(index))

    def load(self, index: int, surveyed: BlockSurvey) -> BlockResult | None:
        """Read what an earlier run found for a block; None if none finished it."""
        found = None if self.work is None else self.work.load(_name(index))
        if found is None:
            return None
        tensors, values = found
        if not self.streamed:  # the model is to be independent of the directory
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        result = BlockResult.read(tensors, values, surveyed.linears)
        self.seconds_before, self.peak_before = result.elapsed, max(self.peak_before, result.peak_bytes)
        return result

    def store(self, index: int, result: BlockResult, peak: int) -> None:
        """Write what was found for a block to the disk, where the next run finds it."""
        if self.work is None:
            return
        result.elapsed = self.seconds_before + time.perf_counter() - self._started
        result.peak_bytes = max(peak, self.peak_before)
        self.work.store(_name(index), *result.stored())
        if self.streamed:
            mapped = self.work.load(_name(index))
            assert mapped is not None
            result.map_buffers(mapped[0])

    def release(self, surveyed: BlockSurvey, result: BlockResult) -> None:
        """Give back the pages of the float weights that are replaced. They stay readable: from the files, if need be."""
        for name in result.modules if self.streamed else ():
            page_out(surveyed.linears[name].weight)


def _name(index: int) -> str:
    return f"block-{index:04}"


def page_out(tensor: Tensor) -> None:
    """Tell the system that the memory of a tensor will not be read soon; only Linux is told, and nothing is ever lost."""
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.numel():
        return
    size = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // size) * size
    end = (
        (tensor.data_ptr() + tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize)
        // size
        * size
    )
    if end > start:
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)
