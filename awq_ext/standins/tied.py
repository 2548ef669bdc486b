"""Output layers that share the embedding's weight: a Linear with a weight of its own in their place, and the end of the tie."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..modules import asks_gradient, parameter_owners, take_hooks
from ..undo.journal import Journal
from .transposed import computes_linear


def tied_to_embedding(model: nn.Module, heads: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Select the heads whose weight belongs to other modules too, but to no other Linear: to an embedding."""
    owners = parameter_owners(model)

    def others(name: str, head: nn.Linear) -> list[nn.Module]:
        tensors = [other for other in owners[id(head.weight)] if other != f"{name}.weight"]
        return [model.get_submodule(tensor.rpartition(".")[0]) for tensor in tensors]

    shared = {name: others(name, head) for name, head in heads.items() if computes_linear(head)}
    return {
        name: heads[name]
        for name, modules in shared.items()
        if modules and not any(isinstance(module, nn.Linear) for module in modules)
    }


def with_own_weight(model: nn.Module, head: nn.Linear) -> nn.Linear:
    """Make a Linear that computes the same with parameters of its own. The weight's memory is still the embedding's.

    A bias that the model holds elsewhere too is copied, as it is part of what transformers ties.
    """
    linear = nn.Linear(head.in_features, head.out_features, device="meta")
    linear.weight = nn.Parameter(head.weight.detach(), requires_grad=asks_gradient(head.weight))
    bias = head.bias
    if bias is not None and len(parameter_owners(model)[id(bias)]) > 1:
        bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    linear.bias = bias
    take_hooks(linear, head)
    return linear.train(head.training)


def keep_untied(model: nn.Module, layers: Container[str], journal: Journal) -> None:
    """Let no model of transformers tie a tensor of ``layers`` (names of modules) to another again.

    Its lists of ties lose them. So does its config, by which files are read, where it ties nothing else: encoders and decoders
    share embeddings by the same entry, and some models scale by what it says.
    """
    for prefix, part in model.named_modules():
        listed = getattr(part, "_tied_weights_keys", None)
        known = getattr(part, "all_tied_weights_keys", None)  # transformers 5: of all parts, as they are tied
        if not listed and not known:
            continue
        left = {
            name: _without(held, prefix, layers)
            for name, held in (("_tied_weights_keys", listed), ("all_tied_weights_keys", known))
            if held
        }
        if all(len(kept) == len(getattr(part, name)) for name, kept in left.items()):
            continue
        for name, kept in left.items():
            journal.set_attribute(part, name, kept)
        if not left.get("all_tied_weights_keys", left.get("_tied_weights_keys")):
            for config in _tying_configs(part):
                journal.set_attribute(config, "tie_word_embeddings", False)


def _without(held: Mapping[str, str] | Sequence[str], prefix: str, layers: Container[str]) -> Any:
    """Return a list of ties (a dictionary in transformers 5) without those of ``layers``."""

    def stays(key: str) -> bool:
        name = key.replace("\\.", ".")
        for leaf in (".weight", ".bias"):
            name = name.removesuffix(leaf)
        return (f"{prefix}.{name}" if prefix else name) not in layers

    kept = [key for key in held if stays(key)]
    return {key: held[key] for key in kept} if isinstance(held, Mapping) else type(held)(kept)


def _tying_configs(part: nn.Module) -> Iterator[Any]:
    config = getattr(part, "config", None)
    text = getattr(config, "get_text_config", None)
    for one in {id(c): c for c in (config, text(decoder=True) if callable(text) else None)}.values():
        if getattr(one, "tie_word_embeddings", False) is True:
            yield one
