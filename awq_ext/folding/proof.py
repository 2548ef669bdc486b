"""The proof that something may take over 1/s: the block's output stays what it was under random factors.

Factors are random powers of two: multiplying by them is exact in binary floating point, so each product keeps its bits and
every sum its order, in bfloat16 as in float32. None of them is 1: a channel that stays as it was is then known not to come
from what was multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..forwards.outputs import error_of
from ..forwards.probe import Probe, combined
from ..survey.groups import ScaleGroup
from .fold import Change, Fold, LinearFold, NormFold
from .tracing import EXACT, find_rows, find_rows_of_all, powers_of_two

# Parameters [., K] of routers that read what a norm returns, as (module, name).
Readers = Sequence[tuple[nn.Module, str]]
# How many earlier Linears are tried as a group's producer: each try runs the block, and a producer is close before its reader.
_NEAREST = 16


@dataclass(frozen=True)
class Candidate:
    """A producer that may take over 1/s, and the Linears that read what it produces."""

    fold: Fold
    linears: tuple[nn.Linear, ...]

    def random_factors(self, seed: int) -> Tensor:
        """Draw powers of two for the channels of what is produced: fp32 [K]."""
        return self.fold.channels(powers_of_two(self.fold.units, seed, self.linears[0].weight.device))

    def columns(self, factors: Tensor) -> list[Change]:
        """List the changes of the Linears that make up for a division of their input by ``factors``."""
        return [(linear, "weight", lambda w: w * factors) for linear in self.linears]


def find_folds(
    probe: Probe,
    groups: Sequence[ScaleGroup],
    linears: Mapping[str, nn.Linear],
    norms: Mapping[str, nn.Module],
    wanted: Sequence[bool],
) -> list[Fold | None]:
    """Find what takes over 1/s of each group that is ``wanted``, proven: a norm of ``norms`` (by name) or an earlier Linear."""
    members = [[linears[name] for name in group.linears] for group in groups]
    fed = {i: norms[g.producer] for i, g in enumerate(groups) if wanted[i] and g.producer in norms}
    proven = prove_norm_folds(probe, [(norm, members[i], groups[i].readers) for i, norm in fed.items()])
    folds: dict[int, Fold] = {i: fold for i, fold in zip(fed, proven, strict=True) if fold is not None}
    rest = [i for i in range(len(members)) if wanted[i] and i not in folds]
    # an expert's output goes to its expert or out of the layer
    dense = [[linears[name] for name in group.linears if name not in group.experts] for group in groups]
    folds |= prove_linear_folds(probe, members, [i for i in rest if not groups[i].near], dense)
    folds |= prove_expert_folds(probe, groups, linears, [i for i in rest if groups[i].near])
    return [folds.get(i) for i in range(len(members))]


def prove(probe: Probe, candidates: Sequence[Candidate]) -> list[bool]:
    """Tell for each candidate whether folding random factors leaves the block's output what it was.

    All are tried together first, and one by one only if that fails. Whatever else reads what a producer makes (a residual tap,
    another branch, a router) is not compensated, so the output changes.
    """
    if len(candidates) > 1 and leaves_unchanged(probe, candidates):
        return [True] * len(candidates)
    return [leaves_unchanged(probe, [candidate]) for candidate in candidates]


def leaves_unchanged(probe: Probe, candidates: Sequence[Candidate], arriving: bool = False) -> bool:
    """Tell whether folding random factors into all ``candidates`` leaves the block's output what it was.

    Factors without any effect would prove nothing. Those of each norm must change the output as long as nothing makes up for
    them. Those of a Linear must arrive at the group's input: ``find_rows`` has seen that, or ``arriving`` asks for it here.
    """
    trial = [change for candidate in candidates for change in candidate.fold.trial()]
    factors = [candidate.random_factors(seed) for seed, candidate in enumerate(candidates)]
    fed = [i for i, candidate in enumerate(candidates) if arriving and isinstance(candidate.fold, LinearFold)]
    consumers = [candidates[i].linears[0] for i in fed]
    reference, xs = probe.watch(combined(trial), consumers) if trial or fed else (probe.reference, [])
    divided: list[Change] = []
    columns: list[Change] = []
    for candidate, its in zip(candidates, factors, strict=True):
        mine = candidate.fold.changes(its)
        silent = isinstance(candidate.fold, NormFold) and not (
            error_of(probe.output(combined(trial + mine)), reference) > EXACT
        )
        if silent:
            return False
        divided += mine
        columns += candidate.columns(its)
    output, seen = probe.watch(combined(trial + divided + columns), consumers)
    arrived = all(_arrived(x, y, factors[i]) for i, x, y in zip(fed, xs, seen, strict=True))
    return arrived and error_of(output, reference) <= EXACT


def _arrived(x: Tensor, seen: Tensor, factors: Tensor) -> bool:
    """Tell whether an input [rows, K] came divided by ``factors`` [K] in all channels but those of zeros; some must not be."""
    if x.shape != seen.shape or not len(x):
        return False
    live = (x != 0).any(0)
    wanted = x.float() / factors
    fits = (seen.float() - wanted).norm(dim=0) <= EXACT * wanted.norm(dim=0)
    return bool(live.any() and fits[live].all())


def prove_norm_fold(
    probe: Probe, norm: nn.Module, linears: Sequence[nn.Linear], readers: Readers = ()
) -> NormFold | None:
    """Find the kind of fold into ``norm`` that leaves the block's output unchanged; None if there is none."""
    for kind in ("plain", "offset"):
        fold = NormFold(norm, kind, linears[0].in_features, tuple(readers))
        if _fits(norm, linears) and leaves_unchanged(probe, [Candidate(fold, tuple(linears))]):
            return fold
    return None


def prove_norm_folds(
    probe: Probe, fed: Sequence[tuple[nn.Module, Sequence[nn.Linear], Readers]]
) -> list[NormFold | None]:
    """Prove the fold into each norm, given with the Linears and the other parameters that read it; None where that fails."""
    plain = [
        Candidate(NormFold(norm, "plain", linears[0].in_features, tuple(readers)), tuple(linears))
        for norm, linears, readers in fed
    ]
    if len(plain) > 1 and all(_fits(norm, linears) for norm, linears, _ in fed) and leaves_unchanged(probe, plain):
        return [candidate.fold for candidate in plain]
    return [prove_norm_fold(probe, *one) for one in fed]


def _fits(norm: nn.Module, linears: Sequence[nn.Linear]) -> bool:
    """Tell whether the norm's weight covers the input channels, once or once for each head (BatchNorm over images does not)."""
    return linears[0].in_features % len(norm.weight) == 0


def prove_linear_folds(
    probe: Probe,
    groups: Sequence[Sequence[nn.Linear]],
    wanted: Sequence[int],
    producers: Sequence[Sequence[nn.Linear]] | None = None,
) -> dict[int, LinearFold]:
    """Find proven folds of groups (by number, in calling order) whose input is proportional to rows of an earlier Linear.

    The nearest earlier Linear that fits and passes is taken; one Linear serves one group. producers: the Linears of each group
    that may be taken (None: all).
    """
    producers = groups if producers is None else producers
    found: dict[int, LinearFold] = {}
    refused: set[tuple[int, nn.Linear]] = set()
    while wanted:
        taken = {fold.module for fold in found.values()}
        candidates: dict[int, Candidate] = {}
        for i, x in zip(wanted, probe.inputs([groups[i][0] for i in wanted], {}), strict=True):
            if not len(x):
                continue
            earlier = [linear for group in reversed(producers[:i]) for linear in reversed(group)][:_NEAREST]
            for producer in (linear for linear in earlier if linear not in taken and (i, linear) not in refused):
                rows = find_rows(probe, groups[i][0], x, producer)
                if rows is not None:
                    candidates[i] = Candidate(LinearFold(producer, rows), tuple(groups[i]))
                    taken.add(producer)
                    break
        for (i, candidate), good in zip(candidates.items(), prove(probe, list(candidates.values())), strict=True):
            if good:
                found[i] = candidate.fold
            else:
                refused.add((i, candidate.fold.module))
        wanted = [i for i in candidates if i not in found]
    return found


def prove_expert_folds(
    probe: Probe, groups: Sequence[ScaleGroup], linears: Mapping[str, nn.Linear], wanted: Sequence[int]
) -> dict[int, LinearFold]:
    """Find folds as :func:`prove_linear_folds` does, for groups of one expert each, into another Linear of that expert.

    The experts of a layer do not read each other's outputs, so all of them are tried in the same runs of the block.
    """
    if not wanted:
        return {}
    place = {name: i for i, group in enumerate(groups) for name in group.linears}
    xs = dict(zip(wanted, probe.inputs([linears[groups[i].linears[0]] for i in wanted], {}), strict=True))
    families: dict[str, list[int]] = {}
    for i in wanted:
        if len(xs[i]):
            families.setdefault(groups[i].family, []).append(i)
    candidates: dict[int, Candidate] = {}
    taken: set[nn.Linear] = set()
    for family in families.values():
        for mate in range(max(len(groups[i].near) for i in family)):
            pairs = {
                i: linears[groups[i].near[mate]]
                for i in family
                if i not in candidates and mate < len(groups[i].near) and place.get(groups[i].near[mate], i) < i
            }
            pairs = {i: producer for i, producer in pairs.items() if producer not in taken}
            consumers = {i: linears[groups[i].linears[0]] for i in pairs}
            for i, rows in find_rows_of_all(probe, consumers, xs, pairs).items():
                members = tuple(linears[name] for name in groups[i].linears)
                candidates[i] = Candidate(LinearFold(pairs[i], rows), members)
                taken.add(pairs[i])
    proven = zip(candidates.items(), prove(probe, list(candidates.values())), strict=True)
    return {i: candidate.fold for (i, candidate), good in proven if good}
