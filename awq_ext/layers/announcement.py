"""Tell storeys above that a model now holds int4 layers, which some make ready to be saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# called with the model, and the layout it came from: None where it was quantized in memory
Listener = Callable[["nn.Module", "str | None"], None]
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Have ``listener`` called for every model that is announced from now on."""
    if listener not in _listeners:
        _listeners.append(listener)


def announce(model: nn.Module, format: str | None = None) -> None:
    """Call all listeners for a model that was quantized or loaded."""
    for listener in _listeners:
        listener(model, format)
