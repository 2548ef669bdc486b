"""Team: the processes of a ``torch.distributed`` group that quantize one model together.

Each waits for others only in Python, and looks meanwhile whether all are alive (``heart.py``); a transfer begins when all are
there. So one that fails, is killed or is stopped ends all others with one error.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..undo import interrupt
from .heart import Heart
from .launch import TIMEOUT
from .parcel import pack, unpack

T = TypeVar("T")
_CHUNK = 64 << 20  # bytes that are sent at a time: each has ``timeout`` seconds
_FIRST_WAIT, _LONGEST_WAIT = 0.001, 0.02  # seconds between two looks


class TeamError(RuntimeError):
    """Another process of those that quantize together failed, was killed or does not answer."""


class Team:
    """The processes as one of them, number ``rank`` of ``size``, sees them. Made by :func:`teamed`.

    All processes must call the same methods in the same order, but for :meth:`post` and :meth:`read`. moved: bytes that this one
    sent, by what they were.
    """

    def __init__(self, group: Any, store: Any, heart: Heart, timeout: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.moved: dict[str, int] = {}
        self._group, self._store, self._heart, self._timeout = group, store, heart, timeout
        self._meetings = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and tells of progress."""
        return self.rank == 0

    def meet(self) -> None:
        """Wait until all processes are here. TeamError if one never will be."""
        self._meetings += 1
        key = f"meeting/{self._meetings}"
        self._ask(lambda _: self._store.add(key, 1))
        self._ask(lambda given_up: _poll(lambda: self._store.add(key, 0) >= self.size, given_up))
        if self.leads:  # all have left the one before
            self._store.delete_key(f"meeting/{self._meetings - 1}")

    def exchange(self, parcels: Sequence[Tensor], what: str) -> list[Tensor]:
        """Send parcel i (uint8 [n_i]) to process i; return what all of them sent to this one, by their numbers."""
        self.meet()
        sizes = torch.tensor([len(parcel) for parcel in parcels])
        all_sizes = [torch.empty_like(sizes) for _ in parcels]
        with self._transfer():
            dist.all_gather(all_sizes, sizes, group=self._group)
            arrived = [torch.empty(int(one[self.rank]), dtype=torch.uint8) for one in all_sizes]
            arrived[self.rank] = parcels[self.rank]
            self._send_and_receive(parcels, arrived)
        sent = sum(len(parcel) for rank, parcel in enumerate(parcels) if rank != self.rank)
        self.moved[what] = self.moved.get(what, 0) + sent
        return arrived

    def _send_and_receive(self, parcels: Sequence[Tensor], arrived: Sequence[Tensor]) -> None:
        works = []
        for step in range(1, self.size):
            source, target = (self.rank - step) % self.size, (self.rank + step) % self.size
            works += [dist.irecv(part, source, group=self._group) for part in _chunks(arrived[source])]
            works += [dist.isend(part, target, group=self._group) for part in _chunks(parcels[target])]
        for work in works:
            work.wait(timedelta(seconds=self._timeout))

    def from_one(self, source: int, make: Callable[[], Tensor], what: str, everyone: bool = True) -> Tensor | None:
        """Let process ``source`` make a parcel; return it in all processes, or (not ``everyone``) only there and in process 0."""
        none = torch.empty(0, dtype=torch.uint8)
        made = make() if self.rank == source else none
        targets = range(self.size) if everyone else {0, source}
        arrived = self.exchange([made if rank in targets else none for rank in range(self.size)], what)
        return arrived[source] if self.rank in targets else None

    def told(self, make: Callable[[], Any]) -> Any:
        """Return in all processes the plain values that ``make`` returns in process 0."""
        parcel = self.from_one(0, lambda: pack({}, make()), "settings")
        assert parcel is not None
        return unpack(parcel)[1]

    def gathered(self, values: Any) -> list[Any]:
        """Return the plain values that each process gives."""
        parcel = pack({}, values)
        return [unpack(one)[1] for one in self.exchange([parcel] * self.size, "settings")]

    def post(self, name: str, text: str) -> None:
        """Leave a text for those who :meth:`read` it."""
        self._ask(lambda _: self._store.set(f"post/{name}", text))

    def read(self, name: str) -> str:
        """Wait for a text that another process leaves."""
        key = f"post/{name}"
        self._ask(lambda given_up: _poll(lambda: self._store.check([key]), given_up))
        return self._ask(lambda _: self._store.get(key)).decode()

    def _ask(self, question: Callable[[threading.Event], T]) -> T:
        """Return the answer to a question to the store, and look meanwhile whether all are alive.

        question: asks, and ends early once the event is set. It runs in a thread: where process 0, which holds the store, is
        stopped, a call of the store never returns.
        """
        answers: list[T] = []
        errors: list[Exception] = []
        over, given_up = threading.Event(), threading.Event()

        def run() -> None:
            try:
                answers.append(question(given_up))
            except Exception as error:
                errors.append(error)
            finally:
                over.set()

        threading.Thread(target=run, name="awq_ext-store", daemon=True).start()
        try:
            while not over.wait(_LONGEST_WAIT):
                interrupt.check()
                if problem := self._heart.problem():
                    raise TeamError(problem)
        finally:
            given_up.set()
        if errors and isinstance(errors[0], (dist.DistStoreError, dist.DistNetworkError)):
            raise TeamError(self._heart.lost()) from errors[0]
        if errors:
            raise errors[0]
        return answers[0]

    @contextmanager
    def _transfer(self) -> Iterator[None]:
        """Say why a transfer failed, once the signs of life tell."""
        try:
            yield
        except RuntimeError as error:
            until = time.monotonic() + 2 * self._timeout
            while time.monotonic() < until:
                if problem := self._heart.problem():
                    raise TeamError(problem) from error
                time.sleep(_LONGEST_WAIT)
            raise TeamError(f"a transfer between processes failed: {error}") from error


def leads(team: Team | None) -> bool:
    """Tell whether this is the first process of a team, or alone."""
    return team is None or team.leads


def _poll(ready: Callable[[], bool], given_up: threading.Event) -> None:
    """Wait until ``ready``, or until nobody wants to know any longer."""
    pause = _FIRST_WAIT
    while not ready() and not given_up.wait(pause):
        pause = min(2 * pause, _LONGEST_WAIT)


def _chunks(parcel: Tensor) -> Sequence[Tensor]:
    return parcel.split(_CHUNK) if len(parcel) else ()


@contextmanager
def teamed(timeout: float = TIMEOUT, wanted: bool = True) -> Iterator[Team | None]:
    """Join the processes of the default group of ``torch.distributed``, all of which must do so; None where there is no other.

    timeout: seconds after which a process without a sign of life counts as dead. What ends the body of one process ends all others
    with a TeamError that tells of it. Inside another ``teamed`` a new team is made.
    """
    if not (math.isfinite(timeout) and timeout > 0):
        raise ValueError(f"timeout={timeout!r}: a number of seconds above 0 is needed")
    if not wanted or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield None
        return
    rank, size = dist.get_rank(), dist.get_world_size()
    # tensors are sent from the memory of the host, whatever the backend of the program's own group
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    store, names = _store(group, rank, size, timeout)
    heart = Heart(store, rank, names, timeout)
    dist.barrier(group=group)
    heart.start()
    team = Team(group, store, heart, timeout)
    failure = ""
    try:
        yield team
        team.meet()
    except BaseException as error:
        if not isinstance(error, TeamError):
            failure = f"{names[rank]} {_told(error)}"
        raise
    finally:
        _leave(heart, rank, timeout, failure)
        with suppress(RuntimeError):
            dist.destroy_process_group(group)


def _store(group: Any, rank: int, size: int, timeout: float) -> tuple[Any, list[str]]:
    """Make a store in process 0 that all share, and name the processes."""
    found: list[Any] = [None] * size
    dist.all_gather_object(found, (socket.gethostname(), os.getpid()), group=group)
    names = [f"process {one} ({host}, pid {pid})" for one, (host, pid) in enumerate(found)]
    near = len({host for host, _ in found}) == 1
    place: list[Any] = [None]
    span = timedelta(seconds=timeout)
    if rank == 0:
        host = "127.0.0.1" if near else os.environ.get("MASTER_ADDR", found[0][0])
        store = dist.TCPStore(host, 0, is_master=True, timeout=span, wait_for_workers=False)
        place = [(host, store.port)]
    dist.broadcast_object_list(place, src=0, group=group)
    if rank != 0:
        store = dist.TCPStore(*place[0], is_master=False, timeout=span)
    return store, names


def _leave(heart: Heart, rank: int, timeout: float, failure: str) -> None:
    """Leave the store, and tell others of a failure; process 0, in which the store is, waits until they have left."""

    def leave() -> None:
        with suppress(RuntimeError):
            if failure:
                heart.fail(failure)
            heart.leave()
            until = time.monotonic() + timeout
            while rank == 0 and time.monotonic() < until and not heart.everyone_left():
                time.sleep(_LONGEST_WAIT)

    # a thread: where process 0 is stopped, it never ends
    leaving = threading.Thread(target=leave, name="awq_ext-leaving", daemon=True)
    leaving.start()
    leaving.join(timeout if rank == 0 else timeout / 2)
    heart.stop()


def _told(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted"
    return f"failed: {type(error).__name__}: {error}"
