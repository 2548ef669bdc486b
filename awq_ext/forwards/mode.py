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
    """Run nothing compiled: it would be traced anew for every hook and every weight that is tried."""
    # to import dynamo takes seconds, and whoever compiled something has done so
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into eval mode while the body runs, with nothing compiled and no key/value cache; then undo all of it.

    Every suspended forward would hold a cache. It is turned off where a config has a switch for it. Encoders of torch make no
    nested tensors of padded batches, whose rows could not be counted. A Ctrl-C comes where
    :func:`awq_ext.undo.interrupt.check` is called, or once all is as it was.
    """
    with interrupt.held():
        training = [(name, module, module.training) for name, module in model.named_modules()]
        owners = {id(c): c for m in model.modules() if getattr(c := getattr(m, "config", None), "use_cache", None)}
        # an encoder and a decoder may have one each
        caching = [(config, config.use_cache) for config in owners.values()]
        encoders = [one for one in model.modules() if isinstance(one, nn.TransformerEncoder)]
        nesting = [one for one in encoders if getattr(one, "use_nested_tensor", False)]
        try:
            model.eval()
            for config, _ in caching:
                config.use_cache = False
            for encoder in nesting:
                encoder.use_nested_tensor = False
            with _eager():
                yield
        finally:
            # by name too: a module that took the place of another takes over its flag
            for name, module, flag in training:
                module.training = model.get_submodule(name).training = flag
            for config, use_cache in caching:
                config.use_cache = use_cache
            for encoder in nesting:
                encoder.use_nested_tensor = True
