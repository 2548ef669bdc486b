"""Questions that can be asked of any nn.Module: who owns a parameter, what may be a norm, where the embeddings are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module behind ``torch.compile(model)``, by whose names everything is called; any other module itself."""
    return model._orig_mod if isinstance(getattr(model, "_orig_mod", None), nn.Module) else model


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """Map the id of every parameter to all names under which the model holds it."""
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{prefix}.{leaf}" if prefix else leaf)
    return owners


def asks_gradient(parameter: nn.Parameter) -> bool:
    """Tell whether a view of ``parameter`` asks for its gradient too; of one that was made in inference mode none may."""
    return parameter.requires_grad and not parameter.is_inference()


def norm_candidates(block: nn.Module) -> dict[str, nn.Module]:
    """Find modules below ``block`` that may be norms: no children, a 1-D weight, at most a bias of the same length beside it."""
    found = {}
    for name, module in block.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        weight = parameters.get("weight")
        if weight is None or weight.dim() != 1 or any(module.children()):
            continue
        if set(parameters) <= {"weight", "bias"} and all(p.shape == weight.shape for p in parameters.values()):
            found[name] = module
    return found


def foldable_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Find the norm candidates whose parameters belong to them alone, by name."""
    owners = parameter_owners(model)
    return {
        name: module
        for name, module in norm_candidates(model).items()
        if all(len(owners[id(p)]) == 1 for p in module.parameters())
    }


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the layer that a model of transformers names as its head, whatever its attribute is called; else None."""
    return _named_by(model, "get_output_embeddings")


def heads_among(model: nn.Module, layers: Mapping[str, M]) -> dict[str, M]:
    """Select the output layers of a language model: what ``get_output_embeddings()`` returns, and what is called lm_head."""
    head = output_embeddings(model)
    return {name: one for name, one in layers.items() if one is head or called_head(name)}


def called_head(name: str) -> bool:
    """Tell by its name whether a layer is the output layer of a language model."""
    return name.rpartition(".")[2] == "lm_head"


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the layer that turns token ids into vectors, where the model names one as transformers does; else None."""
    return _named_by(model, "get_input_embeddings")


def _named_by(model: nn.Module, method: str) -> nn.Module | None:
    getter = getattr(model, method, None)
    try:
        return getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):  # classes without such a layer may inherit the method
        return None


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def take_hooks(module: nn.Module, old: nn.Module) -> None:
    """Give ``module`` the hooks of ``old``: the very dictionaries, so the handles that users hold still remove them."""
    for name in _HOOKS:
        setattr(module, name, getattr(old, name))
    module._is_full_backward_hook = old._is_full_backward_hook
