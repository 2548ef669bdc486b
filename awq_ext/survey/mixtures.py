"""Mixtures of experts: which Linears may be experts by structure, and what may route tokens to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from ..standins.expert_linears import ExpertLinears

# What routers are usually called; seen beside experts these names are believed.
_ROUTER_NAMES = (".router", ".gate")


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer: children of one list, or one child of each ExpertLinears of one module.

    owner: name of the module that holds the list and is called with the tokens. families: for what the Linears are called inside
    an expert, their names, expert by expert. modules: owner and Linears by name. routers: 2-D weights [E, K] beside the experts,
    as (name, module, leaf). fused: they were one parameter, so they are experts for certain.
    """

    owner: str
    families: Mapping[str, tuple[str, ...]]
    modules: Mapping[str, nn.Module]
    routers: tuple[tuple[str, nn.Module, str], ...] = ()
    fused: bool = False

    def routing(self, linears: Iterable[str]) -> set[str]:
        """Those of ``linears`` that choose among the experts: by what they are, or by name where they stand."""
        place = self.owner.rpartition(".")[0] if self.fused else self.owner
        beside = {name for name in linears if name.rpartition(".")[0] == place and name.endswith(_ROUTER_NAMES)}
        return beside | ({name for name, _, _ in self.routers} & set(linears))

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """All Linears in the experts, by name."""
        return {name: self.modules[name] for names in self.families.values() for name in names}


def find_mixtures(model: nn.Module) -> list[Mixture]:
    """Lists of modules of one structure, and ExpertLinears.

    By structure alone: whether the members of a list are experts, or are all called one after another, shows a forward
    (:class:`MixtureWatch`).
    """
    found: dict[tuple[str, int, bool], dict[str, tuple[str, ...]]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        owner, _, leaf = name.rpartition(".")
        fused = isinstance(module, ExpertLinears)
        members = [_linears(child) for child in module.children()]
        if not members[0] or any(member != members[0] for member in members):
            continue
        families = found.setdefault((owner, len(module), fused), {})
        for inner in members[0]:
            names = (f"{name}.{e}.{inner}".rstrip(".") for e in range(len(module)))
            families[f"{leaf}.{inner}".rstrip(".")] = tuple(names)
    modules = dict(model.named_modules())
    return [
        Mixture(
            owner,
            families,
            {name: modules[name] for names in families.values() for name in (owner, *names)},
            tuple(_routers(modules, owner, families, fused)),
            fused,
        )
        for (owner, _, fused), families in found.items()
    ]


def _linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Shapes of the Linears in one member of a list, by their names in it."""
    return {n: (m.in_features, m.out_features) for n, m in module.named_modules() if isinstance(m, nn.Linear)}


def _routers(
    modules: Mapping[str, nn.Module], owner: str, families: Mapping[str, tuple[str, ...]], fused: bool
) -> Iterator[tuple[str, nn.Module, str]]:
    """Weights [E, K] beside the experts. What holds fused experts holds their biases too, so there it is one module higher."""
    if fused and not owner:
        return
    place = owner.rpartition(".")[0] if fused else owner
    experts = {modules[name] for names in families.values() for name in names}
    count = len(next(iter(families.values())))
    widths = {modules[names[0]].in_features for names in families.values()}
    for name, module in modules[place].named_modules(prefix=place):
        if module in experts or (fused and name == owner):
            continue
        for leaf, weight in module._parameters.items():
            if weight is not None and weight.dim() == 2 and len(weight) == count and weight.shape[1] in widths:
                yield name, module, leaf
