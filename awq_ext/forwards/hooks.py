"""Hooks that see what modules are called with and what they return, while a ``with`` block runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn


class Hooks(ExitStack):
    """Forward hooks on any number of modules, all of which are removed when the ``with`` block is left.

    What ``see`` returns is ignored before a call; after one it replaces the output, unless it is None.
    """

    def input(self, module: nn.Module, see: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        """Run ``see(args, kwargs)`` before each call of ``module``."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(args, kwargs)

        self.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def output(self, module: nn.Module, see: Callable[[Any], Any]) -> None:
        """Run ``see(output)`` after each call of ``module``."""
        self.callback(module.register_forward_hook(lambda _, __, output: see(output)).remove)
