"""Selection of the Linears to quantize: what the settings want, what can be quantized, and why the others stay float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import nn

from ..config import FORMER_SKIP, AwqConfig, Selector, did_you_mean, fits, suggested
from ..forwards.calls import Call
from ..forwards.mode import calibration_mode
from ..layers.quant_linear import QuantLinear
from ..modules import called_head, heads_among, output_embeddings, parameter_owners
from ..standins.expert_linears import ROUTER
from ..standins.fused import find_fused, routers_beside
from ..standins.standins import StandIns, stand_in, transposed_layers
from ..standins.tied import tied_to_embedding
from ..standins.transposed import computes_linear, multiplies_transposed
from ..undo.journal import Journal


@dataclass
class Eligible:
    """The Linears of a model that can be quantized, and why the others stay as they are."""

    linears: dict[str, nn.Linear] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def check_layers(model: nn.Module, config: AwqConfig) -> torch.device:
    """Return the device of the weights to quantize. No sample is read yet.

    Raises ValueError if ``config`` leaves none, for a pattern of ``skip`` or ``only`` that fits nothing, and for a ``head`` of a
    model without one.
    """
    if type(model) is nn.Linear:
        raise ValueError(
            "model is a bare Linear, which has no place to put another layer: wrap it, nn.Sequential(linear)"
        )
    excluded = Choice(model, config)
    eligible = eligible_linears(model, excluded)
    weights = [linear.weight for linear in eligible.linears.values()]
    weights += [head.weight for head in tied_to_embedding(model, _wanted_heads(model, excluded, config)).values()]
    weights += [fused.original for fused in find_fused(model, excluded) if not fused.reason]
    weights += [module.weight for name, module in transposed_layers(model).items() if not excluded(name, module)]
    excluded.check_patterns()
    if not weights:
        _refuse(model, eligible)
    return weights[0].device


def _refuse(model: nn.Module, eligible: Eligible) -> NoReturn:
    if not eligible.reasons:
        raise ValueError(f"{type(model).__name__} has no nn.Linear: there is nothing to quantize")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in eligible.reasons.items())
    raise ValueError(f"no Linear is left to quantize: {reasons}")


def select_linears(model: nn.Module, call: Call, config: AwqConfig, journal: Journal) -> tuple[Eligible, StandIns]:
    """Select the Linears that ``config`` wants quantized, and put Linears in place of layers that hold weights otherwise.

    Raises ValueError if there is none, if a ``per_layer`` pattern fits none, or if a wanted output layer cannot be quantized.
    """
    excluded = Choice(model, config)
    heads = _wanted_heads(model, excluded, config)
    standins = stand_in(model, call, excluded, journal, calibration_mode, heads)
    eligible = eligible_linears(model, excluded)
    eligible.reasons |= standins.unfused.reasons
    for name in routers_beside(model) & eligible.linears.keys():
        del eligible.linears[name]
        eligible.reasons[name] = ROUTER
    if not eligible.linears:
        _refuse(model, eligible)
    if heads and not heads.keys() & eligible.linears.keys():
        reasons = "; ".join(f"{name}: {eligible.reasons[name]}" for name in heads)
        raise ValueError(
            f'AwqConfig.head={config.head!r}: the output layer cannot be quantized ({reasons}): use head="float"'
        )
    for pattern in config.per_layer:
        if not any(fits(pattern, name) for name in eligible.linears):
            raise ValueError(_fits_none(f"per_layer[{pattern!r}]", pattern, list(eligible.linears)))
    return eligible, standins


def eligible_linears(model: nn.Module, excluded: Callable[[str, nn.Linear], str | None]) -> Eligible:
    """Sort the Linears of ``model`` into those that can be quantized and those that stay, with the reasons.

    Stay: those that ``excluded`` gives a reason for, have a forward of their own, or share their weight. Layers that do a Linear's
    work without being one (Conv1D of transformers) are named among the reasons. Raises ValueError, naming the layer, for a model
    that is quantized already and for integer or meta weights.
    """
    owners = parameter_owners(model)
    found = Eligible()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantLinear):
            raise ValueError(
                f"{name} is a QuantLinear already: quantize the float model, a quantized one cannot be again"
            )
        if not isinstance(module, nn.Linear):
            if multiplies_transposed(module):
                found.reasons[name] = f"{type(module).__name__} is no nn.Linear (its weight is transposed)"
            continue
        if reason := _reason_to_leave(name, module, owners, excluded):
            found.reasons[name] = reason
        else:
            found.linears[name] = module
    return found


def _reason_to_leave(
    name: str, module: nn.Linear, owners: Mapping[int, list[str]], excluded: Callable[[str, nn.Linear], str | None]
) -> str | None:
    if reason := excluded(name, module):
        return reason
    if not computes_linear(module):
        return f"{type(module).__name__} has a forward of its own"
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or torch.nn.utils.parametrize.is_parametrized(module, "weight"):
        return "its weight is computed by a parametrization"
    if others := [owner for owner in owners[id(weight)] if owner != f"{name}.weight"]:
        return f"its weight is shared with {', '.join(others)}"
    if weight.is_meta:
        raise ValueError(f"{name}.weight is on the meta device: load the weights before quantizing")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name}.weight is {weight.dtype}: float32, bfloat16 or float16 is needed")
    # a sum is finite only if all terms are (fp32 holds the sum of any weight that can be quantized), and needs no copy
    if not torch.isfinite(weight.detach().sum(dtype=torch.float32)):
        return "its weight holds NaN or Inf"
    return None


def _wanted_heads(
    model: nn.Module, excluded: Callable[[str, nn.Linear], str | None], config: AwqConfig
) -> dict[str, nn.Linear]:
    """Select the output layers that ``config.head`` wants quantized, tied or not; ValueError for a model that has none."""
    if config.head == "float":
        return {}
    linears = {name: one for name, one in model.named_modules(remove_duplicate=False) if isinstance(one, nn.Linear)}
    heads = heads_among(model, linears)
    if not heads:
        named = output_embeddings(model)
        what = (
            "names no output layer" if named is None else f"has a {type(named).__name__} as its output layer, no Linear"
        )
        raise ValueError(
            f"AwqConfig.head={config.head!r}: {type(model).__name__} {what} (get_output_embeddings(), or a Linear called "
            'lm_head): use head="float", with which all other Linears are quantized'
        )
    return {name: head for name, head in heads.items() if excluded(name, head) is None}


class Choice:
    """Tells of a layer's name and module why ``config`` leaves it as it is, or None; and which patterns fitted none of them."""

    def __init__(self, model: nn.Module, config: AwqConfig) -> None:
        self._model, self._config = model, config
        self._head = output_embeddings(model) if config.head == "float" else None
        self._names: dict[str, None] = {}

    def __call__(self, name: str, module: nn.Module) -> str | None:
        config = self._config
        self._names[name] = None
        if module is self._head:
            return "the model's output embeddings"
        if config.head == "float" and called_head(name):
            return "the output layer, by its name"
        if any(_selects(selector, name, module) for selector in config.skip):
            return "skipped by pattern"
        if config.only and not any(_selects(selector, name, module) for selector in config.only):
            return "not among `only`"
        count = module.weight.numel() if config.min_weights else 0
        if count < config.min_weights:
            return f"has {count} weights, fewer than min_weights={config.min_weights}"
        return None

    def check_patterns(self) -> None:
        """Raise ValueError for a pattern that fits none of the layers asked about, with those it may have meant.

        One of ``skip`` may also fit modules that hold none of them (embeddings, norms): they stay float as it is.
        """
        names = list(self._names)
        for which in ("skip", "only"):
            for pattern in getattr(self._config, which):
                if not isinstance(pattern, str) or any(fits(pattern, name) for name in names):
                    continue
                if which == "skip" and (pattern in FORMER_SKIP or self._fits_beside(pattern)):
                    continue
                raise ValueError(_fits_none(f"{which}={pattern!r}", pattern, names))

    def _fits_beside(self, pattern: str) -> bool:
        holders = {name[:dot] for name in self._names for dot, c in enumerate(name) if c == "."} | {""}
        others = (name for name, _ in self._model.named_modules() if name not in holders)
        return any(fits(pattern, name) for name in others)


def _fits_none(what: str, pattern: str, names: Sequence[str]) -> str:
    text = f"AwqConfig.{what} fits none of the {len(names)} layers"
    near = suggested(pattern, names)
    return text + (did_you_mean(near) if near else f", whose names are like {', '.join(names[:3])}")


def _selects(selector: Selector, name: str, module: nn.Module) -> bool:
    return fits(selector, name) if isinstance(selector, str) else bool(selector(name, module))
