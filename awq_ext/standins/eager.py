"""Loops: the experts of a module one by one, where transformers would run all of them in one operation."""

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
    """Let modules run their own forward instead of a fused implementation."""
    real = {module: module.config for module in configs}
    try:
        for module, config in configs.items():
            module.config = config
        yield
    finally:
        for module, config in real.items():
            module.config = config


def eager_config(module: nn.Module) -> Any | None:
    """A copy of ``module.config`` by which transformers runs the module's own loop over experts; None: it does so already.

    Only the copy says so: the model's other modules share the config.
    """
    config = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", None) in (None, "eager"):
        return None
    copied = copy.copy(config)
    # the property would write to the configs below, which the copy shares
    copied._experts_implementation_internal = "eager"
    return copied if copied._experts_implementation == "eager" else None


def eager_configs(modules: Iterable[nn.Module]) -> dict[nn.Module, Any]:
    """By module, the config by which it runs its own loop; modules of one config share the new one."""
    by_config: dict[int, Any] = {}
    configs = {}
    for module in modules:
        config = getattr(module, "config", None)
        if (copied := by_config.setdefault(id(config), eager_config(module))) is not None:
            configs[module] = copied
    return configs


@contextmanager
def loop_errors(configs: Mapping[nn.Module, Any]) -> Iterator[dict[nn.Module, float]]:
    """How far what a module's own loop computes is from what runs now (of its norm), on the inputs that the body calls it with."""
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
