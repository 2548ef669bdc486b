"""The mode in which a model is calibrated and scored: eval, nothing compiled, no key/value cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..undo import interrupt


def _eager() -> AbstractContextManager[Any]:
    """A compiled forward would be traced anew for every hook and every weight that is tried."""
    # importing dynamo takes seconds, and what was compiled has imported it
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """eval mode, nothing compiled, and no key/value cache where there is a switch (every suspended forward would hold one).

    A Ctrl-C comes where :func:`awq_ext.interrupt.check` is called, or once all is as it was.
    """
    with interrupt.held():
        training = [(name, module, module.training) for name, module in model.named_modules()]
        owners = {id(c): c for m in model.modules() if getattr(c := getattr(m, "config", None), "use_cache", None)}
        # an encoder and a decoder may have one each
        caching = [(config, config.use_cache) for config in owners.values()]
        try:
            model.eval()
            for config, _ in caching:
                config.use_cache = False
            with _eager():
                yield
        finally:
            # by name too: a module that took the place of another takes over its flag
            for name, module, flag in training:
                module.training = model.get_submodule(name).training = flag
            for config, use_cache in caching:
                config.use_cache = use_cache
