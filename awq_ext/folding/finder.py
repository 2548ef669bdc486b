"""Precedent: what folded in one block is tried first in the next, all at once. It is proven anew; only the search is spared."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..forwards.probe import Probe
from ..survey.groups import ScaleGroup
from .fold import Fold, LinearFold, NormFold
from .proof import Candidate, find_folds, leaves_unchanged


@dataclass(frozen=True)
class _Pattern:
    """A fold without the modules of its block: the kind of a norm, or which Linear of which group and its rows."""

    kind: str = ""
    producer: tuple[int, int] = (-1, -1)
    rows: Tensor | None = None


class FoldFinder:
    """Finds the folds of one block after another. norms: by name, those that may take a scale.

    Where every group of a block got one, the same folds are tried in later blocks with groups of the same shapes; only if that
    fails such a block is searched as the first one was (:func:`find_folds`).
    """

    def __init__(self, norms: Mapping[str, nn.Module]) -> None:
        self._norms = norms
        self._patterns: dict[Hashable, list[_Pattern | None]] = {}

    def find(
        self, probe: Probe, groups: Sequence[ScaleGroup], linears: Mapping[str, nn.Linear], wanted: Sequence[bool]
    ) -> list[Fold | None]:
        """For each group that is ``wanted``, what takes its 1/s, proven."""
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

    def _shape(
        self, groups: Sequence[ScaleGroup], members: Sequence[Sequence[nn.Linear]], wanted: Sequence[bool]
    ) -> Hashable:
        """What two blocks must have in common for the folds of one to fit the other."""
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
    """All candidates; in float16 norms and Linears apart, since few weights stay exact under the factors of both."""
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
