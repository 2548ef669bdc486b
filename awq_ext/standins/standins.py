"""Linears that stand in, while a model is quantized, for layers that hold their weights in another form."""

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
from .transposed import has_transposed_form, linear_of, multiplies_transposed, with_weight_of
from .unfuse import Unfused, unfuse

# Share of a model's parameters.
_WORTH_A_WARNING = 0.01


@dataclass
class StandIns:
    """What was replaced: layers with a transposed weight, by name, and fused experts."""

    transposed: dict[str, nn.Module] = field(default_factory=dict)
    unfused: Unfused = field(default_factory=Unfused)

    def notes(self) -> list[str]:
        """What a reader of the report should know."""
        names = list(self.unfused.configs)
        if not names:
            return []
        before = {str(config._experts_implementation) for config in self.unfused.configs.values()}
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return [f"{names[0]}{more}: the experts run one by one (eager) instead of by {', '.join(sorted(before))}"]

    def warnings(self, parameters: int) -> list[str]:
        """What was not done, and how much of a model with that many parameters it is."""
        left = self.unfused.refused
        share = sum(fused.original.numel() for fused in left) / max(parameters, 1)
        if share < _WORTH_A_WARNING:
            return []
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        return [f"{left[0].name}{more} stay float, {share:.1%} of all parameters: {left[0].reason}"]

    def put_back(self, model: nn.Module, journal: Journal) -> None:
        """Once layers are quantized: give what stayed a float Linear its own form back, with the weights it has by now."""
        for name, original in self.transposed.items():
            now = model.get_submodule(name)
            if isinstance(now, nn.Linear):
                same = now.weight.data_ptr() == original.weight.data_ptr()
                journal.set_module(model, name, original if same else with_weight_of(original, now))
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
) -> StandIns:
    """Turn transposed layers and fused experts into Linears. excluded: why a layer shall stay as it is, or None.

    With fused experts the first batch runs up to three times, in ``mode``. Raises CalibrationError when the model rejects it.
    """
    result = StandIns(transposed_layers(model))
    for name, module in result.transposed.items():
        journal.set_module(model, name, linear_of(module))
    result.unfused = unfuse(model, call, find_fused(model, excluded), journal, mode)
    return result


def transposed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that multiply by a weight [K, N] which is theirs alone, by name."""
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

    fused: how each fused parameter was used. Raises ValueError where the model does not fit.
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
