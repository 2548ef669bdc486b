"""A finder of folds for block after block: those of one block are tried first in the next, where only the search is spared."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..forwards.probe import Probe
from ..survey.groups import ScaleGroup
from .fold import Fold, LinearFold, NormFold
from .proof import Candidate, find_folds, leaves_unchanged


@dataclass(frozen=True)
class _Pattern:
    """A fold without the modules of its block: the kind of a norm, or a Linear's place (group, position in it) and its rows."""

    kind: str = ""
    producer: tuple[int, int] = (-1, -1)
    rows: Tensor | None = None

    def plain(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        rows = None if self.rows is None else self.rows.tolist()
        return {"kind": self.kind, "producer": list(self.producer), "rows": rows}

    @classmethod
    def of(cls, plain: Mapping[str, Any], device: torch.device) -> _Pattern:
        """Inverse of :meth:`plain`."""
        rows = None if plain["rows"] is None else torch.tensor(plain["rows"], device=device)
        return cls(plain["kind"], tuple(plain["producer"]), rows)


class FoldFinder:
    """Finds the folds of one block after another. norms: those that may take a scale, by name.

    Where every group of a block got a fold, the same ones are tried, all at once, in later blocks with groups of the same shapes.
    They are proven there like any others. Only if that fails is such a block searched as the first one was (:func:`find_folds`).
    """

    def __init__(self, norms: Mapping[str, nn.Module]) -> None:
        self._norms = norms
        self._patterns: dict[Hashable, list[_Pattern | None]] = {}

    def find(
        self, probe: Probe, groups: Sequence[ScaleGroup], linears: Mapping[str, nn.Linear], wanted: Sequence[bool]
    ) -> list[Fold | None]:
        """Find what takes over 1/s of each group that is ``wanted``, proven; None for other groups and where nothing can."""
        with probe.recalling():
            return self._found(probe, groups, linears, wanted)

    def _found(
        self, probe: Probe, groups: Sequence[ScaleGroup], linears: Mapping[str, nn.Linear], wanted: Sequence[bool]
    ) -> list[Fold | None]:
        members = [tuple(linears[name] for name in group.linears) for group in groups]
        shape = self._shape(groups, members, wanted)
        if patterns := self._patterns.get(shape):
            folds = [self._fold(pattern, i, groups, members) for i, pattern in enumerate(patterns)]
            given = [Candidate(fold, mine) for fold, mine in zip(folds, members, strict=True) if fold is not None]
            if all(leaves_unchanged(probe, part, arriving=True) for part in _provable_together(given)):
                return folds
        folds = find_folds(probe, groups, linears, self._norms, wanted)
        self._patterns.pop(shape, None)
        if any(wanted) and all(fold is not None for fold, one in zip(folds, wanted, strict=True) if one):
            self._patterns[shape] = [_pattern(fold, members) for fold in folds]
        return folds

    def remembered(
        self, groups: Sequence[ScaleGroup], linears: Mapping[str, nn.Linear], wanted: Sequence[bool]
    ) -> list[dict[str, Any] | None] | None:
        """Return the folds that later blocks like this one are tried with, as plain values; None where there are none."""
        members = [tuple(linears[name] for name in group.linears) for group in groups]
        patterns = self._patterns.get(self._shape(groups, members, wanted))
        if patterns is None:
            return None
        return [None if one is None else one.plain() for one in patterns]

    def remember(
        self,
        groups: Sequence[ScaleGroup],
        linears: Mapping[str, nn.Linear],
        wanted: Sequence[bool],
        plain: Sequence[Mapping[str, Any] | None] | None,
    ) -> None:
        """Go on as after the search of a block that :meth:`remembered` was asked of, in another process maybe."""
        members = [tuple(linears[name] for name in group.linears) for group in groups]
        shape = self._shape(groups, members, wanted)
        self._patterns.pop(shape, None)
        if plain is not None:
            device = members[0][0].weight.device
            self._patterns[shape] = [None if one is None else _Pattern.of(one, device) for one in plain]

    def _shape(
        self, groups: Sequence[ScaleGroup], members: Sequence[Sequence[nn.Linear]], wanted: Sequence[bool]
    ) -> Hashable:
        """Describe what two blocks must have in common for the folds of one to fit the other."""
        norms = [self._norms.get(group.producer or "") for group in groups]
        return tuple(
            (one, None if norm is None else len(norm.weight), tuple(linear.weight.shape for linear in mine))
            for one, norm, mine in zip(wanted, norms, members, strict=True)
        )

    def _fold(
        self, pattern: _Pattern | None, i: int, groups: Sequence[ScaleGroup], members: Sequence[Sequence[nn.Linear]]
    ) -> Fold | None:
        if pattern is None:
            return None
        if pattern.rows is not None:
            group, place = pattern.producer
            return LinearFold(members[group][place], pattern.rows)
        norm = self._norms[groups[i].producer]
        return NormFold(norm, pattern.kind, members[i][0].in_features, tuple(groups[i].readers))


def _provable_together(candidates: Sequence[Candidate]) -> Iterator[list[Candidate]]:
    """Yield all candidates at once; in float16 norms and Linears apart, since few weights stay exact under the factors of both."""
    if all(candidate.linears[0].weight.dtype != torch.float16 for candidate in candidates):
        yield list(candidates)
        return
    for kind in (NormFold, LinearFold):
        if part := [candidate for candidate in candidates if isinstance(candidate.fold, kind)]:
            yield part


def _pattern(fold: Fold | None, members: Sequence[Sequence[nn.Linear]]) -> _Pattern | None:
    if fold is None:
        return None
    if isinstance(fold, NormFold):
        return _Pattern(fold.kind)
    places = ((i, k) for i, mine in enumerate(members) for k in range(len(mine)) if mine[k] is fold.module)
    return _Pattern(producer=next(places), rows=fold.rows)
