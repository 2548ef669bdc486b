"""Backwards through a user's model: no parameter asks for its gradient, and blocks keep nothing but their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..forwards.inputs import copy_inputs


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for its gradient, so that autograd keeps no inputs for it."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            # one that was made in inference mode can be told so in that mode alone
            with torch.inference_mode(parameter.is_inference()):
                parameter.requires_grad_(True)


@contextmanager
def checkpointed(blocks: Sequence[nn.Module], model: nn.Module) -> Iterator[None]:
    """Let blocks keep nothing for a backward but their inputs, and run once more when it comes to them.

    They run on copies: a block that writes its inputs must find them as they were.
    """

    def rerun(forward: Callable[..., Any]) -> Callable[..., Any]:
        def on_copies(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = copy_inputs((args, kwargs))
            return forward(*args, **kwargs)

        return lambda *args, **kwargs: checkpoint(on_copies, *args, use_reentrant=False, **kwargs)

    changed: list[tuple[nn.Module, Any]] = []
    try:
        for block in blocks:
            if block is not model:
                changed.append((block, vars(block).get("forward")))
                block.forward = rerun(block.forward)
        yield
    finally:
        for block, own in changed:
            if own is None:
                vars(block).pop("forward", None)
            else:
                block.forward = own
