"""Scale groups of experts: those that read rows of one tensor get one scale, together with what reads all of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..standins.expert_linears import ROUTER
from .expert_rows import ExpertHooks, RowSource, row_hashes, row_tensors
from .groups import ScaleGroup, Watch
from .mixtures import Mixture


class MixtureWatch(ExpertHooks):
    """What one forward shows of mixtures: rows that came to each expert, and rows of the tensors they may have come from."""

    def __init__(self, mixtures: Sequence[Mixture]) -> None:
        super().__init__(mixtures)
        self.reasons: dict[str, str] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._sources: dict[str | None, dict[Hashable, RowSource]] = {}

    def _see_source(self, owner: str | None, name: str, value: Any) -> None:
        for place, tensor in row_tensors(value):
            self._sources.setdefault(owner, {}).setdefault((name, place), RowSource()).add(tensor)

    def _see_rows(self, name: str, x: Tensor | None) -> None:
        if x is not None:
            self._rows.setdefault(name, []).append(row_hashes(x))

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
        candidates = [*self._sources.get(None, {}).values(), *self._sources.get(owner, {}).values()]
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
