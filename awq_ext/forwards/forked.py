"""Torch's threads in a child of fork(), which has none of the OpenMP team that torch would wait for."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from ..reporting.warn import warn

P = ParamSpec("P")
T = TypeVar("T")
_forked = False


def _note_fork() -> None:
    global _forked  # noqa: PLW0603
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def finishing_after_fork(function: Callable[P, T]) -> Callable[P, T]:
    """Make ``function`` run torch on one thread in a child of fork(), with a warning.

    With more, any operation of torch that splits its work waits for ever there, if the parent had one: libgomp takes the parent's
    team for its own. DataLoader workers have one thread anyway, and kernels of this package have threads of their own in a child.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        threads = torch.get_num_threads()
        if not _forked or threads == 1:
            return function(*args, **kwargs)
        warn(
            f"{function.__name__} runs on one thread: this process was forked from one that may have used torch's threads. "
            'Torch would wait for them for ever: start it with multiprocessing\'s "spawn" to use all, or set_num_threads(1)'
        )
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return run
