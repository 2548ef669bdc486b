"""Interrupts: a Ctrl-C that comes while a user's model is not what it was waits for a moment at which that can be undone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_waiting: list[int] = []  # the number of a signal that came, at most one


@contextmanager
def held() -> Iterator[None]:
    """While the body runs, a first Ctrl-C waits for :func:`check` or the end of the body, a second one comes at once.

    Python raises KeyboardInterrupt between any two instructions: also between taking a hook off and the next one, or after
    something was changed and before what would undo it is known. Does nothing within another ``held()``, outside the main thread
    (signals do not come there), and where the program has a handler of its own.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _waiting.clear()
    signal.signal(signal.SIGINT, _hold)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _hold:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            check()


def check() -> None:
    """Raise the KeyboardInterrupt that waits, if one does: to be called, often enough, where whatever was done can be undone."""
    if _waiting and threading.current_thread() is threading.main_thread():
        _waiting.clear()
        raise KeyboardInterrupt


def _hold(number: int, frame: FrameType | None) -> None:
    if _waiting:
        _waiting.clear()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt
    _waiting.append(number)
