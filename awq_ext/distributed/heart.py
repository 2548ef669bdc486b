"""Signs of life: a thread of each process gives them, and watches those of all others."""

from __future__ import annotations

import threading
import time
from typing import Any

# Signs in each timeout: a single late one is no death.
_SIGNS = 10
_FAILURE = "failure"


class Heart:
    """Gives this process's signs of life to a store that all share, and reads those of the others.

    store: a ``torch.distributed.Store``, of which this makes a client of its own: others may be blocked in theirs. names: of all
    processes, for messages. timeout: seconds without a sign after which a process counts as dead. It goes on while Python code or
    kernels compute, and not while the process is stopped.
    """

    def __init__(self, store: Any, rank: int, names: list[str], timeout: float) -> None:
        self._store, self._rank, self._names, self._timeout = store.clone(), rank, names, timeout
        self._failure = ""
        now = time.monotonic()
        self._read = now  # when the signs were read last
        self._signs = [(b"", now)] * len(names)
        self._ended = threading.Event()
        self._told = threading.Lock()
        self._left = False
        self._store.set(_key(rank), "0")
        self._thread = threading.Thread(target=self._beat, name="awq_ext-heart", daemon=True)

    def start(self) -> None:
        """Begin; every process must have made its heart by now."""
        self._read = time.monotonic()
        self._signs = [(b"", self._read)] * len(self._names)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(self._timeout / _SIGNS)  # a call of a store whose process is stopped never returns

    def leave(self) -> None:
        """Tell the store, once, that this process needs it no longer."""
        with self._told:
            if not self._left:
                self._left = True
                self._store.add("left", 1)

    def everyone_left(self) -> bool:
        """Tell whether no process needs the store any longer."""
        return self._store.add("left", 0) >= len(self._names)

    def fail(self, message: str) -> None:
        """Tell all others why this process ends; only the first failure counts."""
        self._store.compare_set(_FAILURE, "", message)

    def problem(self) -> str:
        """Say why the work cannot go on; "" if it can."""
        now = time.monotonic()
        if self._failure:
            return self._failure
        if now - self._read > 2 * self._timeout:  # the store is in process 0
            return self._silent(0)
        late = [rank for rank, (_, seen) in enumerate(self._signs) if now - seen > self._timeout and rank != self._rank]
        # none is late for sure where all are: then this process was asleep
        return self._silent(late[0]) if late and now - self._read < self._timeout else ""

    def lost(self) -> str:
        """Say what happened where process 0, which holds the store, cannot be reached."""
        return self._failure or self._silent(0)

    def _silent(self, rank: int) -> str:
        return (
            f"{self._names[rank]} gave no sign of life for {self._timeout:g} s: it was killed or is stopped, or its machine "
            "cannot be reached"
        )

    def _beat(self) -> None:
        count = 0
        keys = [_key(rank) for rank in range(len(self._names))]
        while not self._ended.wait(self._timeout / _SIGNS):
            count += 1
            try:
                self._store.set(_key(self._rank), str(count))
                signs = self._store.multi_get(keys)
                if self._store.check([_FAILURE]):
                    self._failure = self._store.get(_FAILURE).decode()
                    self.leave()
                    return
            except RuntimeError:  # torch's own errors of a store
                if not self._ended.is_set():
                    self._failure = self.lost()
                return
            self._read = now = time.monotonic()
            self._signs = [
                before if before[0] == sign else (sign, now) for before, sign in zip(self._signs, signs, strict=True)
            ]


def _key(rank: int) -> str:
    return f"alive/{rank}"
