"""Which Linears the user wants quantized: the skip and only patterns and the size threshold of a config."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from .config import OUTPUT_EMBEDDINGS, AwqConfig, Selector


def reason_to_skip(model: nn.Module, config: AwqConfig) -> Callable[[str, nn.Module], str | None]:
    """A function of a layer's name and module: why ``config`` leaves it as it is, or None."""
    head = output_embeddings(model) if OUTPUT_EMBEDDINGS in config.skip else None

    def reason(name: str, module: nn.Module) -> str | None:
        if module is head:
            return "the model's output embeddings"
        if any(_selects(selector, name, module) for selector in config.skip):
            return "skipped by pattern"
        if config.only and not any(_selects(selector, name, module) for selector in config.only):
            return "not among `only`"
        count = module.weight.numel() if config.min_weights else 0
        if count < config.min_weights:
            return f"has {count} weights, fewer than min_weights={config.min_weights}"
        return None

    return reason


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The layer that a model of transformers names as its head, whatever it is called; None for other models."""
    return _named_by(model, "get_output_embeddings")


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Likewise, the layer that turns its input into vectors."""
    return _named_by(model, "get_input_embeddings")


def _named_by(model: nn.Module, method: str) -> nn.Module | None:
    getter = getattr(model, method, None)
    try:
        return getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):  # classes without such a layer may inherit the method
        return None


def _selects(selector: Selector, name: str, module: nn.Module) -> bool:
    return fnmatchcase(name, selector) if isinstance(selector, str) else bool(selector(name, module))
