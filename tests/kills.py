"""Kill a process at any of its operations on files, or at any time."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable

import pytest

POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="the process that is killed is a fork of this one")
EVENTS = ("open", "os.", "shutil.", "ctypes.")  # audit events of operations on files, and of the exchange


def killed_after(seconds: float, action: Callable[[], object]) -> bool:
    """Run ``action`` in a fork that the system ends after so many seconds, wherever it is. Whether it came to that."""
    child = _forked()
    if child:
        return _was_killed(child)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whose action is to end the process at once, as SIGKILL does
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _run_and_exit(action)
    raise AssertionError


def killed(step: int, action: Callable[[], object]) -> bool:
    """Run ``action`` in a fork that kills itself before its ``step``-th operation on files. Whether it was killed."""
    child = _forked()
    if child:
        return _was_killed(child)
    count = 0

    def hook(event: str, _: object) -> None:
        nonlocal count
        if event.startswith(EVENTS):
            count += 1
            if count == step:  # os.kill is such an event itself
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    _run_and_exit(action)
    raise AssertionError


def _forked() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork in a process with threads
        return os.fork()


def _was_killed(child: int) -> bool:
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _run_and_exit(action: Callable[[], object]) -> None:
    try:
        action()
        os._exit(0)
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(1)
