"""Fused experts: parameters [E, N, K] that hold the matrices of experts, taken apart into Linears and put back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..modules import asks_gradient, parameter_owners
from ..undo.journal import Journal
from .eager import eager_config
from .expert_linears import USES, ExpertLinears


@dataclass
class FusedWeight:
    """A parameter that may hold the matrices of experts: ``module._parameters[leaf]``, [E, N, K] or [E, K, N].

    original: the parameter. order: the names of all parameters of the module, in order. reason: why it stays as it is, or "".
    use: how the model's forward uses it, one of USES.
    """

    name: str
    module: nn.Module
    leaf: str
    original: nn.Parameter
    order: tuple[str, ...] = ()
    reason: str = ""
    use: str = ""

    def linears(self, use: str) -> ExpertLinears:
        """Make one Linear for each expert; their weights are views of the parameter."""
        fused = self.original
        made = []
        for matrix in fused.detach():
            weight = matrix if use == "linear" else matrix.T
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=asks_gradient(fused))
            made.append(linear)
        return ExpertLinears(made, use).train(self.module.training)

    def finish(self, journal: Journal) -> None:
        """Put the parameter back if all experts stayed float; else give those that did a copy of their weight alone."""
        experts = self.module._modules[self.leaf]
        left = [linear for linear in experts.children() if isinstance(linear, nn.Linear)]
        if len(left) < len(experts):
            for linear in left:  # a view would keep the whole parameter
                weight = linear.weight
                linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            return
        start, end = self.original.data_ptr(), self.original.data_ptr() + self.original.nbytes
        parameter = self.original
        if not all(start <= linear.weight.data_ptr() < end for linear in left):
            parameter = _stacked(experts)
        journal.put_parameter(self.module, self.leaf, parameter, self.order)


def find_fused(
    model: nn.Module, excluded: Callable[[str, nn.Linear], str | None] = lambda *_: None
) -> list[FusedWeight]:
    """Find what looks like fused experts: parameters of three dimensions, held by modules that are not torch's own.

    excluded: tells why a layer shall stay as it is, or None; the experts are called ``parameter.0``, ``parameter.1``, ...
    Raises ValueError for weights on the meta device.
    """
    owners = parameter_owners(model)
    found = []
    for prefix, module in model.named_modules():
        if isinstance(module, _ConvNd) or type(module).__module__.startswith("torch.nn."):
            continue
        for leaf, parameter in module._parameters.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if parameter is None or parameter.dim() != 3 or min(parameter.shape) < 2:
                continue
            if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                continue
            if parameter.is_meta:
                raise ValueError(f"{name} is on the meta device: load the weights before quantizing")
            fused = FusedWeight(name, module, leaf, parameter, tuple(module._parameters))
            if others := [owner for owner in owners[id(parameter)] if owner != name]:
                fused.reason = f"its weight is shared with {', '.join(others)}"
            else:
                fused.reason = _reason_for_all(fused, excluded)
            found.append(fused)
    return found


def routers_beside(model: nn.Module) -> set[str]:
    """Find the names of Linears that may route to fused experts: one output row for each, and inputs as wide as theirs.

    This is for parameters that stay whole; the routers of others are found with their Linears (``survey/mixtures.py``).
    """
    found = set()
    for fused in find_fused(model):
        count, *sides = fused.original.shape
        place = fused.name.rpartition(".")[0].rpartition(".")[0]
        for name, module in model.get_submodule(place).named_modules(prefix=place):
            if isinstance(module, nn.Linear) and module.out_features == count and module.in_features in sides:
                found.add(name)
    return found


def _reason_for_all(fused: FusedWeight, excluded: Callable[[str, nn.Linear], str | None]) -> str:
    reasons = [excluded(f"{fused.name}.{e}", linear) for e, linear in enumerate(fused.linears("linear").children())]
    return reasons[0] if reasons[0] and all(reasons) else ""


def unfuse_as(model: nn.Module, name: str, use: Any, journal: Journal) -> None:
    """Take apart the parameter called ``name`` as :func:`unfuse.unfuse` once did, without a batch.

    Experts that are apart already stay so. Raises ValueError where the model has no such parameter.
    """
    prefix, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        raise ValueError(f"the model has no module {prefix!r}, which holds the experts") from None
    held = module._modules.get(leaf)
    if isinstance(held, ExpertLinears) and held.use == use:
        return
    parameter = module._parameters.get(leaf)
    if use not in USES or parameter is None or parameter.dim() != 3:
        raise ValueError(f"{name} holds no fused experts that could be taken apart (use {use!r})")
    journal.replace_parameter(module, leaf, FusedWeight(name, module, leaf, parameter).linears(use))
    if (config := eager_config(module)) is not None:
        journal.set_attribute(module, "config", config)


def put_back(model: nn.Module, journal: Journal) -> None:
    """Turn experts that are all float Linears into one parameter again."""
    for module in list(model.modules()):
        for leaf, experts in list(module._modules.items()):
            if isinstance(experts, ExpertLinears) and all(isinstance(e, nn.Linear) for e in experts.children()):
                journal.put_parameter(module, leaf, _stacked(experts), (*module._parameters, leaf))


def _stacked(experts: ExpertLinears) -> nn.Parameter:
    """Make the parameter [E, N, K] (or [E, K, N]) that holds the weights of these Linears."""
    weights = [linear.weight for linear in experts.children()]
    matrices = [w.detach() if experts.use == "linear" else w.detach().T for w in weights]
    return nn.Parameter(torch.stack(matrices), requires_grad=weights[0].requires_grad)
