"""Stand-ins: Linears in place of layers with their weights in another form, while a model is quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..forwards.calls import Call
from ..layers.quant_linear import QuantLinear
from ..modules import parameter_owners
from ..undo.journal import Journal
from .expert_linears import ExpertLinears
from .fused import find_fused, unfuse_as
from .tied import keep_untied, tied_to_embedding, with_own_weight
from .transposed import has_transposed_form, linear_of, multiplies_transposed, with_weight_of
from .unfuse import Unfused, unfuse

# The share of a model's parameters that may stay float without a warning.
_WORTH_A_WARNING = 0.01


@dataclass
class StandIns:
    """What Linears stand in for: layers with a transposed weight and tied heads, by name, and fused experts."""

    transposed: dict[str, nn.Module] = field(default_factory=dict)
    unfused: Unfused = field(default_factory=Unfused)
    tied: dict[str, nn.Linear] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """Tell the report which experts run one by one now."""
        names = list(self.unfused.configs)
        if not names:
            return []
        before = {str(config._experts_implementation) for config in self.unfused.configs.values()}
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return [f"{names[0]}{more}: the experts run one by one (eager) instead of by {', '.join(sorted(before))}"]

    def warnings(self, parameters: int) -> list[str]:
        """Warn of experts that stay float, if they are much of a model with that many ``parameters``."""
        left = self.unfused.refused
        share = sum(fused.original.numel() for fused in left) / max(parameters, 1)
        if share < _WORTH_A_WARNING:
            return []
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        return [f"{left[0].name}{more} stay float, {share:.1%} of all parameters: {left[0].reason}"]

    def put_back(self, model: nn.Module, journal: Journal) -> None:
        """Give what was not quantized its own form back, with the weights that its stand-in has by now."""
        for name, original in self.transposed.items():
            now = model.get_submodule(name)
            if isinstance(now, nn.Linear):
                same = now.weight.data_ptr() == original.weight.data_ptr()
                journal.set_module(model, name, original if same else with_weight_of(original, now))
        for name, original in self.tied.items():
            now = model.get_submodule(name)
            if isinstance(now, nn.Linear) and now.weight.data_ptr() == original.weight.data_ptr():
                journal.set_module(model, name, original)
            else:
                keep_untied(model, (name,), journal)
        for fused in self.unfused.weights:
            fused.finish(journal)
        for name, config in self.unfused.configs.items():
            module = model.get_submodule(name)
            if not any(isinstance(child, ExpertLinears) for child in module.children()):
                journal.set_attribute(module, "config", config)


def stand_in(
    model: nn.Module,
    call: Call,
    excluded: Callable[[str, nn.Linear], str | None],
    journal: Journal,
    mode: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
    heads: Mapping[str, nn.Linear] | None = None,
) -> StandIns:
    """Put Linears in place of transposed layers, fused experts and those of ``heads`` whose weight is the embedding's too.

    excluded: tells why a layer shall stay, or None. With fused experts the first batch runs up to three times, in ``mode``. Raises
    CalibrationError when the model rejects it.
    """
    result = StandIns(transposed_layers(model))
    for name, module in result.transposed.items():
        journal.set_module(model, name, linear_of(module))
    result.tied = tied_to_embedding(model, heads or {})
    for name, head in result.tied.items():
        journal.set_module(model, name, with_own_weight(model, head))
    result.unfused = unfuse(model, call, find_fused(model, excluded), journal, mode)
    return result


def transposed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Find the layers that multiply by a weight [K, N] which is theirs alone, by name."""
    owners = parameter_owners(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name and multiplies_transposed(module) and len(owners[id(module.weight)]) == 1
    }


def stand_in_as(
    model: nn.Module, layers: Mapping[str, tuple[int, int]], fused: Mapping[str, str], journal: Journal
) -> None:
    """Give ``model`` the Linears that a checkpoint's layers (name -> in_features, out_features) were made from.

    fused: by the names of fused parameters, how each was used. Raises ValueError where the model does not fit.
    """
    for name, use in fused.items():
        unfuse_as(model, name, use, journal)
    for name, sizes in layers.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        other = not isinstance(module, (nn.Linear, QuantLinear)) and has_transposed_form(module)
        if other and tuple(module.weight.shape) == tuple(sizes):
            journal.set_module(model, name, linear_of(module))
