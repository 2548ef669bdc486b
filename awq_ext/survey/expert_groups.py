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
    """Watches mixtures during one forward: the rows that came to each expert, and the tensors that they may have come from."""

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

    def routed(self) -> list[Mixture]:
        """Select the mixtures in which rows of one tensor were spread over the experts, instead of all rows going to each."""
        return [m for m in self.mixtures if any(self._source(m, n) for n in m.families.values())]

    def join(
        self,
        groups: Sequence[ScaleGroup],
        watch: Watch,
        linears: Mapping[str, nn.Linear],
        kind: Callable[[str], Hashable],
    ) -> list[ScaleGroup]:
        """Join the experts that read rows of one tensor into one group, together with what reads all of it.

        Experts that the forward did not call are added, to the group of the others or as groups of their own. Routers are left
        out and named in ``reasons``, even if none of the experts is among ``linears``.
        """
        joined = list(groups)
        for mixture in self.mixtures:
            sources = {inner: self._source(mixture, names) for inner, names in mixture.families.items()}
            if mixture.fused or any(sources.values()):
                routers = mixture.routing(linears)
                self.reasons |= dict.fromkeys(routers, ROUTER)
                joined = _join_mixture(_without(joined, routers), mixture, sources, watch, linears, kind)
        return joined

    def _source(self, mixture: Mixture, names: Sequence[str]) -> RowSource | None:
        """Find the tensor that these Linears read some rows of, among norms' outputs first; None if each reads all of it."""
        seen = [torch.cat(self._rows[name]) for name in names if name in self._rows]
        if not any(len(rows) for rows in seen):
            return None
        rows = torch.cat(seen)
        for source in (*self._sources.get(None, {}).values(), *self._sources.get(mixture.owner, {}).values()):
            if source.width == mixture.modules[names[0]].in_features:
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
    sources: Mapping[str, RowSource | None],
    watch: Watch,
    linears: Mapping[str, nn.Linear],
    kind: Callable[[str], Hashable],
) -> list[ScaleGroup]:
    def input_of(name: str, identities: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(identities), kind(name), linears[name].in_features

    expert_of = {name: e for names in mixture.families.values() for e, name in enumerate(names)}
    selected = [
        (name, sources[inner]) for inner, names in mixture.families.items() for name in names if name in linears
    ]
    shared: dict[tuple[Any, ...], list[str]] = {}
    for name, source in selected:
        if source is not None:
            shared.setdefault(input_of(name, source.identities), []).append(name)
    readers = tuple((module, leaf) for _, module, leaf in mixture.routers if _fine_enough(module, leaf))
    result = list(groups)
    for key, names in shared.items():
        # what reads all rows (a shared expert) is fed by the same producer: one scale for it too
        heads = [(group.linears, group.linears[0]) for group in result]
        beside = [members for members, first in heads if input_of(first, watch.inputs.get(first, ())) == key]
        parts = [*beside, *_parts(result, [n for n in names if not any(n in part for part in beside)], expert_of)]
        members = tuple(name for part in parts for name in part)
        experts = frozenset(mixture.linears.keys() & set(members))
        kept = [group for group in result if not set(group.linears) & set(members)]
        place = next((i for i, group in enumerate(kept) if group is not result[i]), len(kept))
        joint = ScaleGroup(members, watch.producer(key[0]), tuple(parts), readers, experts)
        result = [*kept[:place], joint, *kept[place:]]
    grouped = {name for group in result for name in group.linears}
    result += [ScaleGroup((name,), None) for name, _ in selected if name not in grouped]
    return [_beside_its_expert(group, mixture, expert_of) for group in result]


def _parts(groups: Sequence[ScaleGroup], names: Sequence[str], expert_of: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Sort names into parts that read the very same tensor: as the forward showed; uncalled experts as those that were called."""
    wanted = set(names)
    seen = [part for group in groups if (part := tuple(name for name in group.linears if name in wanted))]
    wanted -= {name for part in seen for name in part}
    together = any(len(part) > 1 for part in seen)
    unseen: dict[Hashable, list[str]] = {}
    for name in (name for name in names if name in wanted):
        unseen.setdefault(expert_of[name] if together else name, []).append(name)
    return [*seen, *map(tuple, unseen.values())]


def _beside_its_expert(group: ScaleGroup, mixture: Mixture, expert_of: Mapping[str, int]) -> ScaleGroup:
    """Name the other Linears of its expert as possible producers, if the group belongs to one expert alone."""
    experts = {expert_of.get(name) for name in group.linears}
    if len(experts) > 1 or None in experts:
        return group
    (expert,) = experts
    near = tuple(names[expert] for names in reversed(mixture.families.values()) if names[expert] not in group.linears)
    inner = next(inner for inner, names in mixture.families.items() if group.linears[0] in names)
    return replace(group, experts=frozenset(group.linears), near=near, family=f"{mixture.owner}: {inner}")


def _fine_enough(module: nn.Module, leaf: str) -> bool:
    """Tell whether a router's weight may be multiplied by the scale: in half precision its rounding would choose other experts."""
    return torch.finfo(module._parameters[leaf].dtype).eps <= 2.0**-20
