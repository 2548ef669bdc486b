"""The part of torch's state that belongs to a thread: what must be swapped when suspended forwards share one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

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
