"""Many ways for one run to end: it forks at chosen moments, so that what comes before each need not be computed again."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

SECONDS = 120  # after which a child that hangs is killed
SHOWN = 5  # failures of one run, of which there may be hundreds


class Forks:
    """A run and its children. In a child something else happens at one moment, and the rest of the run is judged there.

    A child has the thread that forked and no other, which is enough: tests let torch use one. It ends by ``os._exit``, so
    that nothing it shares with the test runner is flushed or closed twice.
    """

    def __init__(self) -> None:
        self.labels: list[Any] = []
        self._failures: list[str] = []
        self._to_parent: int | None = None  # in a child: where it reports to

    def fork(self, label: Any, act: Callable[[], Any]) -> None:
        """To be called in the midst of the run: a child goes on with ``act()``, the run itself goes on without."""
        if self._to_parent is not None:
            return
        self.labels.append(label)
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads that a test runner may have
            child = os.fork()
        if child == 0:
            os.close(reader)
            signal.alarm(SECONDS)
            self._to_parent = writer
            act()
            return
        os.close(writer)
        with open(reader, encoding="utf-8", errors="replace") as pipe:
            said = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 0:
            self._failures.append(f"--- {label}, exit status {status}\n{said}")

    def run(self, work: Callable[[], Any], check: Callable[[Any, BaseException | None], None]) -> None:
        """Call ``work``, which forks. In each child ``check`` gets its label and what ``work`` raised there."""
        error: BaseException | None = None
        try:
            work()
        except BaseException as raised:
            error = raised
        if self._to_parent is not None:
            self._end(self._to_parent, lambda: check(self.labels[-1], error))
        if error is not None:
            raise error
        assert not self._failures, f"{len(self._failures)} of {len(self.labels)}, the first of them:\n" + "\n".join(
            self._failures[:SHOWN]
        )

    def _end(self, to_parent: int, check: Callable[[], None]) -> NoReturn:
        status = 1
        try:
            check()
            status = 0
        except BaseException:
            os.write(to_parent, traceback.format_exc()[-60_000:].encode(errors="replace"))  # less than a pipe holds
        finally:
            os._exit(status)
