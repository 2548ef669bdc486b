"""Eager experts: a module runs its experts one by one, where transformers would run all of them in one operation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..forwards.outputs import distance_of, norm_of


@contextmanager
def eager(configs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Give modules these configs while the body runs, so that each runs its own forward, not a grouped implementation."""
    real = {module: module.config for module in configs}
    try:
        for module, config in configs.items():
            module.config = config
        yield
    finally:
        for module, config in real.items():
            module.config = config


def eager_config(module: nn.Module) -> Any | None:
    """Make a copy of ``module.config`` by which transformers runs the module's own loop over experts; None if it does so already.

    The config itself stays, since the model's other modules share it.
    """
    config = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", None) in (None, "eager"):
        return None
    copied = copy.copy(config)
    # the property would write to the configs below, which the copy shares
    copied._experts_implementation_internal = "eager"
    return copied if copied._experts_implementation == "eager" else None


def eager_configs(modules: Iterable[nn.Module]) -> dict[nn.Module, Any]:
    """Make the :func:`eager_config` of each module that needs one; modules of one config share the new one."""
    by_config: dict[int, Any] = {}
    configs = {}
    for module in modules:
        config = getattr(module, "config", None)
        if (copied := by_config.setdefault(id(config), eager_config(module))) is not None:
            configs[module] = copied
    return configs


@contextmanager
def eager_errors(configs: Mapping[nn.Module, Any]) -> Iterator[dict[nn.Module, float]]:
    """Measure how far each module's own loop is from what runs now, relative to its norm, on the inputs of the body's calls."""
    errors: dict[nn.Module, float] = {}

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        with eager({module: configs[module]}):
            again = module.forward(*args, **kwargs)
        tensors, others = ([t for t in tree_leaves(o) if isinstance(t, Tensor)] for o in (output, again))
        error = distance_of(tensors, others) / (norm_of(tensors) or 1.0)
        errors[module] = max(error, errors.get(module, 0.0))

    with ExitStack() as stack:
        for module in configs:
            stack.callback(module.register_forward_hook(compare, with_kwargs=True).remove)
        yield errors
