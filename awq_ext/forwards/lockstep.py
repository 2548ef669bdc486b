"""Calibration forwards in lockstep: every batch reaches a block before any of them goes on to the next one.

Each batch's own ``model(*args, **kwargs)`` runs in a greenlet and stops at the entry of every block. So the hidden states of
only one block boundary exist at a time, and the model's own code decides what every block is called with. Greenlets share
the thread: there is no OpenMP team per batch, and exactly one forward runs at any time. Grad mode, inference mode and autocast
belong to the thread, so they are swapped at every stop (``undo/thread_state.py``).
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import greenlet
import torch
from torch import nn

from ..undo import interrupt
from ..undo.thread_state import ThreadState, other_state
from .calls import CalibrationError, Call, run_call
from .hooks import Hooks
from .inputs import copy_inputs

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """A part of the model that is calibrated and quantized as one."""

    name: str
    module: nn.Module


class Stop:
    """A batch that waits at the entry of a block, and the very arguments of that call."""

    def __init__(self, worker: Worker, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._worker = worker
        self.block = block
        self.call = worker.call
        self._args = args
        self._kwargs = kwargs

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of that call."""
        return self._args, self._kwargs

    @property
    def index(self) -> int:
        """The batch's number."""
        return self._worker._index

    @property
    def waiting(self) -> bool:
        """Whether the batch waits here, and has not been advanced."""
        return self._worker.stop is self

    def run_on_copies(
        self, gradients: bool = False, inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    ) -> Any:
        """Run the block on copies of its arguments and return its output; the forward stays where it is.

        It runs in the grad mode and autocast of this batch's forward, or with ``gradients`` in grad mode. Hooks on the block
        itself do not run (its submodules' do). inputs: other arguments, on which a batch that went on can run the block too.
        """

        def run() -> Any:
            args, kwargs = copy_inputs(inputs or (self._args, self._kwargs))
            with torch.enable_grad() if gradients else nullcontext():
                return self.block.module.forward(*args, **kwargs)

        return self._worker.do(run)

    def advance(self) -> None:
        """Let the forward run on, to the next block or to its end."""
        # whoever still holds this stop must not keep the hidden states that the forward is about to leave behind
        self._args, self._kwargs = (), {}
        self._worker.advance()


class Worker(greenlet.greenlet):
    """One batch's forward. Talks to its caller (the greenlet that made it) by switching values back and forth.

    index: the batch's number, for messages. stop: where it waits; None before its start, while it runs and after its end.
    """

    def __init__(
        self, model: nn.Module, index: int, call: Call, home: ThreadState, waits: Callable[[Stop], None]
    ) -> None:
        super().__init__(self._forward)
        # greenlets start with empty context variables; the forward must see those of the caller
        self.gr_context = contextvars.copy_context()
        self._model = model
        self._index = index
        self._home = home
        self._waits = waits
        self.call = call
        self.stop: Stop | None = None
        self._result: Any = None

    def _forward(self) -> None:
        try:
            with torch.no_grad():
                run_call(self._model, self.call, self._index)
        finally:
            self.stop = None  # the stop knows its worker: a cycle, which would keep the hidden states alive

    def pause(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Wait inside the forward and run what the caller requests, until it requests to go on (None)."""
        self.stop = Stop(self, block, args, kwargs)
        self._waits(self.stop)
        while True:
            with other_state(self._home):
                request = self.parent.switch()
            if request is None:
                break
            # not passed through switch(): this frame would hold it while it waits
            self._result = request()
        self.stop = None

    def advance(self) -> None:
        """Start the forward, or let it run on: to the next block or to its end."""
        interrupt.check()
        self.switch() if not self else self.switch(None)

    def end(self) -> None:
        """Cut the forward off; one that catches the exit runs to its end, since its hooks are gone by now."""
        if self:
            # what a model makes of being cut off is no error of the calibration
            with suppress(Exception):
                self.throw(greenlet.GreenletExit)

    def do(self, request: Callable[[], T]) -> T:
        interrupt.check()
        grad = torch.is_grad_enabled()
        self.switch(request)
        torch.set_grad_enabled(grad)  # the forward came back in the mode that all began in
        result, self._result = self._result, None
        return result


@contextmanager
def lockstep(
    model: nn.Module,
    blocks: Sequence[Block],
    calls: Sequence[Call],
    waits: Callable[[Stop], None] = lambda stop: None,
) -> Iterator[Iterator[tuple[Block, list[Stop]]]]:
    """Give an iterator over ``blocks`` (in calling order), each with the batches that wait at its entry.

    The body of the loop may run blocks on copies, and advance stops; those that it did not advance are advanced before the next
    block. ``waits`` is called for each batch that begins to wait. Leaving the context ends all forwards where they are (what
    follows the last block never runs) and removes every hook.
    """
    with suspended(model, blocks, list(enumerate(calls)), waits) as workers:
        yield _visits(blocks, workers)


@contextmanager
def suspended(
    model: nn.Module,
    blocks: Sequence[Block],
    calls: Sequence[tuple[int, Call]],
    waits: Callable[[Stop], None] = lambda stop: None,
) -> Iterator[list[Worker]]:
    """Give the forwards of numbered ``calls``, not begun yet, each of which stops at the entry of every block.

    The body advances them; it sees to it that no batch comes back to a block (:func:`refuse_returns`). All else as for
    :func:`lockstep`.
    """
    home = ThreadState.capture()
    workers = [Worker(model, index, call, home, waits) for index, call in calls]
    on = Hooks()
    try:
        for block in blocks:
            on.input(block.module, partial(_stop_at, block))
        yield workers
    finally:
        on.close()
        for worker in workers:
            worker.end()
        home.apply()


def _stop_at(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    worker = greenlet.getcurrent()
    if isinstance(worker, Worker):
        worker.pause(block, args, kwargs)


def _visits(blocks: Sequence[Block], workers: Sequence[Worker]) -> Iterator[tuple[Block, list[Stop]]]:
    for worker in workers:
        worker.advance()
    for position, block in enumerate(blocks):
        refuse_returns(blocks[:position], workers)
        stops = [worker.stop for worker in workers if worker.stop is not None and worker.stop.block is block]
        yield block, stops
        for stop in stops:
            if stop._worker.stop is stop and block is not blocks[-1]:
                stop.advance()


def refuse_returns(done: Sequence[Block], workers: Sequence[Worker]) -> None:
    """Raise CalibrationError where a batch waits at a block that is done."""
    for worker in workers:
        if worker.stop is not None and worker.stop.block in done:
            raise CalibrationError(
                f"calibration batch {worker._index} came back to block {worker.stop.block.name!r}, which was finished "
                "before: blocks are not called in one order by all batches; pass blocks=[] to calibrate the model as a whole"
            )
