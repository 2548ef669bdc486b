"""Launched by torchrun, or by whatever else sets its variables: one of several processes that run the same command."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
TIMEOUT = 30.0  # seconds without a sign of life after which a process counts as dead

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def launched() -> Iterator[bool]:
    """Join the others where this is one of several processes, as the variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say.

    Gives whether this is the first one, or alone. The others print nothing while the body runs, but the errors that end it.
    ValueError for variables that are missing or are no numbers.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield True
        return
    from torch import distributed as dist  # torch takes a second, which --help need not wait for

    if not dist.is_available() or dist.is_initialized():
        yield True
        return
    if missing := [name for name in _NEEDED if not os.environ.get(name)]:
        raise ValueError(
            f"WORLD_SIZE={size} asks for several processes, but {', '.join(missing)} is not set: use torchrun"
        )
    rank = _number("RANK", 0)
    dist.init_process_group("gloo")
    try:
        with ExitStack() as stack:
            if rank:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield rank == 0
    finally:
        dist.destroy_process_group()


def one_of_several(function: Callable[P, T]) -> Callable[P, T]:
    """Make ``function`` run in :func:`launched`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with launched():
            return function(*args, **kwargs)

    return run


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal():
        raise ValueError(f"the variable {name} is {text!r}: a number of processes is needed")
    return int(text)
