"""The part of torch's state that belongs to a thread: what must be swapped when suspended forwards share one thread."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
_AUTOCAST_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class ThreadState:
    """Grad mode and autocast settings of the running thread."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool

    @classmethod
    def capture(cls) -> ThreadState:
        """The state as it is now."""
        return cls(
            grad=torch.is_grad_enabled(),
            autocast=tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _AUTOCAST_DEVICES),
            autocast_cache=torch.is_autocast_cache_enabled(),
        )

    def apply(self) -> None:
        """Make this the state of the running thread."""
        torch.set_grad_enabled(self.grad)
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        # casts cached by one suspended forward must not outlive a weight that another one sees changed
        torch.clear_autocast_cache()


def restoring(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, after which grad mode and autocast are what they were before, whatever ended it.

    A Ctrl-C may come while ``no_grad`` is on its way out, in a model's own forward too, and then nothing is turned on again.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        mine = ThreadState.capture()
        try:
            return function(*args, **kwargs)
        finally:
            mine.apply()

    return run


@contextmanager
def other_state(state: ThreadState) -> Iterator[None]:
    """Run the body in ``state``, then come back to the present one, whatever happens.

    Inference mode has no setter, only a guard that restores what it found: leaving it before ``state`` is applied and
    re-entering it afterwards happens on this side of the switch, so guards of different forwards never interleave.
    """
    mine = ThreadState.capture()
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        state.apply()
        try:
            yield
        finally:
            mine.apply()
