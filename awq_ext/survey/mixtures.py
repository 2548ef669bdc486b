"""Mixtures of experts: which Linears are experts, what rows they all read, and what routes tokens to them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..standins.expert_linears import ROUTER, ExpertLinears
from .expert_rows import RowSource, expert_rows, row_hashes
from .groups import ScaleGroup, Watch

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


class MixtureWatch:
    """What one forward shows of mixtures: rows that came to each expert, and rows of the tensors they may have come from."""

    def __init__(self, mixtures: Sequence[Mixture]) -> None:
        self.mixtures = mixtures
        self.reasons: dict[str, str] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._sources: dict[str, dict[str, RowSource]] = {}

    @contextmanager
    def on(self, norms: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch while the body runs a forward. norms: in it, by name. All experts are watched, those too that stay float."""

        def owner_called(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                for i, leaf in enumerate(tree_leaves((args, kwargs))):
                    self._see(name, f"argument {i}", leaf)

            return hook

        def expert_called(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if (x := expert_rows(args, kwargs)) is not None:
                    self._rows.setdefault(name, []).append(row_hashes(x))

            return hook

        def norm_called(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                self._see("", name, output)

            return hook

        with ExitStack() as stack:
            for mixture in self.mixtures:
                hook = owner_called(mixture.owner)
                stack.callback(mixture.modules[mixture.owner].register_forward_pre_hook(hook, with_kwargs=True).remove)
                for name, linear in mixture.linears.items():
                    hook = expert_called(name)
                    stack.callback(linear.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if self.mixtures:
                for name, norm in norms.items():
                    stack.callback(norm.register_forward_hook(norm_called(name)).remove)
            yield

    def _see(self, owner: str, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            self._sources.setdefault(owner, {}).setdefault(name, RowSource()).add(value)

    def shown(self) -> list[Mixture]:
        """Those of which some Linears were called with rows of one tensor, not all with all of it."""
        return [m for m in self.mixtures if any(self._source(m.owner, n, m.linears) for n in m.families.values())]

    def join(
        self,
        groups: Sequence[ScaleGroup],
        watch: Watch,
        linears: Mapping[str, nn.Linear],
        kind: Callable[[str], Hashable],
    ) -> list[ScaleGroup]:
        """``groups`` with the experts that read rows of one tensor joined into one, together with what reads all of it.

        Experts that the forward did not call are added: to the group of the others, or as groups of their own. Routers are
        left out, and named in ``reasons``, whether any of the experts is among ``linears`` or not.
        """
        joined = list(groups)
        for mixture in self.mixtures:
            sources = {
                inner: self._source(mixture.owner, names, mixture.linears) for inner, names in mixture.families.items()
            }
            families = {inner: [name for name in names if name in linears] for inner, names in mixture.families.items()}
            families = {inner: names for inner, names in families.items() if names}
            if not mixture.fused and not any(sources.values()):
                continue
            routers = mixture.routing(linears)
            self.reasons |= dict.fromkeys(routers, ROUTER)
            joined = _without(joined, routers)
            joined = _join_mixture(joined, mixture, families, sources, watch, linears, kind)
        return joined

    def _source(self, owner: str, names: Sequence[str], linears: Mapping[str, nn.Linear]) -> RowSource | None:
        """Of what tensor all inputs of these Linears are rows, norms' outputs first; None: of none, or all see all of it."""
        seen = [torch.cat(self._rows[name]) for name in names if name in self._rows]
        if not any(len(rows) for rows in seen):
            return None
        rows = torch.cat(seen)
        candidates = [*self._sources.get("", {}).values(), *self._sources.get(owner, {}).values()]
        for source in candidates:
            if source.width != linears[names[0]].in_features:
                continue
            whole = torch.cat(source.hashes)
            if torch.isin(rows, whole).all() and not all(torch.equal(one, whole) for one in seen):
                return source
        return None


def _without(groups: Sequence[ScaleGroup], names: set[str]) -> list[ScaleGroup]:
    kept = [(group, tuple(name for name in group.linears if name not in names)) for group in groups]
    return [replace(group, linears=linears) for group, linears in kept if linears]


def _join_mixture(
    groups: Sequence[ScaleGroup],
    mixture: Mixture,
    families: Mapping[str, Sequence[str]],
    sources: Mapping[str, RowSource | None],
    watch: Watch,
    linears: Mapping[str, nn.Linear],
    kind: Callable[[str], Hashable],
) -> list[ScaleGroup]:
    expert_of = {name: e for names in mixture.families.values() for e, name in enumerate(names)}
    shared: dict[Hashable, list[str]] = {}
    for inner, names in families.items():
        if (source := sources[inner]) is not None:
            for name in names:
                shared.setdefault((tuple(source.identities), kind(name), linears[name].in_features), []).append(name)
    result = list(groups)
    for (identities, own_kind, width), names in shared.items():
        # what reads all rows (a shared expert) is fed by the same producer: one scale for it too
        beside = [
            group.linears
            for group in result
            if tuple(watch.inputs.get(group.linears[0], ())) == identities
            and (kind(group.linears[0]), linears[group.linears[0]].in_features) == (own_kind, width)
        ]
        parts = [*beside, *_parts(result, [n for n in names if not any(n in part for part in beside)], expert_of)]
        members = tuple(name for part in parts for name in part)
        readers = tuple((module, leaf) for _, module, leaf in mixture.routers if _fine_enough(module, leaf))
        joint = ScaleGroup(
            members, watch.producer(identities), tuple(parts), readers, frozenset(mixture.linears.keys() & set(members))
        )
        first = next((i for i, group in enumerate(result) if set(group.linears) & set(members)), len(result))
        rest = [group for group in result[first:] if not set(group.linears) & set(members)]
        result = [*result[:first], joint, *rest]
    grouped = {name for group in result for name in group.linears}
    result += [ScaleGroup((name,), None) for names in families.values() for name in names if name not in grouped]
    return [_beside_its_expert(group, mixture, expert_of) for group in result]


def _parts(groups: Sequence[ScaleGroup], names: Sequence[str], expert_of: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Names that read the very same tensor, together: as the forward showed, for experts it did not call as for the others."""
    wanted = set(names)
    seen = [part for group in groups if (part := tuple(name for name in group.linears if name in wanted))]
    wanted -= {name for part in seen for name in part}
    together = any(len(part) > 1 for part in seen)
    unseen: dict[Hashable, list[str]] = {}
    for name in (name for name in names if name in wanted):
        unseen.setdefault(expert_of[name] if together else name, []).append(name)
    return [*seen, *map(tuple, unseen.values())]


def _beside_its_expert(group: ScaleGroup, mixture: Mixture, expert_of: Mapping[str, int]) -> ScaleGroup:
    """``group`` with the other Linears of its expert as possible producers, if it belongs to one expert alone."""
    experts = {expert_of.get(name) for name in group.linears}
    if len(experts) > 1 or None in experts:
        return group
    (expert,) = experts
    near = tuple(names[expert] for names in reversed(mixture.families.values()) if names[expert] not in group.linears)
    inner = next(inner for inner, names in mixture.families.items() if group.linears[0] in names)
    return replace(group, experts=frozenset(group.linears), near=near, family=f"{mixture.owner}: {inner}")


def _fine_enough(module: nn.Module, leaf: str) -> bool:
    """Whether a router's weight can be multiplied by the scale: rounded again in half precision it would choose others."""
    return torch.finfo(module._parameters[leaf].dtype).eps <= 2.0**-20
