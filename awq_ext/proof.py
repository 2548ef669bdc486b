"""The proof that something may take over 1/s: the block's output stays what it was under random factors.

Factors are random powers of two: multiplying by them is exact in binary floating point, so each product keeps its bits and
every sum its order, in bfloat16 as in float32. None of them is 1, which would show nothing: what stays as it was is not driven
by what was multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .fold import Change, Fold, LinearFold, NormFold
from .groups import ScaleGroup
from .probe import Probe, combined, distance_of, norm_of

# Parameters [., K] that read what a norm returns, as (module, name): routers.
Readers = Sequence[tuple[nn.Module, str]]

# What exact arithmetic may still differ by: products that underflow in half precision.
_EXACT = 2.0**-20
EXPONENTS = (-2, -1, 1, 2)
# Earlier Linears that are tried as a group's producer: each try runs the block, and what produces an input is close before it.
_NEAREST = 16


@dataclass(frozen=True)
class Candidate:
    """A producer that may take over 1/s, and the Linears that read what it produces."""

    fold: Fold
    linears: tuple[nn.Linear, ...]

    def random_factors(self, seed: int) -> Tensor:
        """Random powers of two for the channels of what is produced: fp32 [K]."""
        return self.fold.channels(_powers_of_two(self.fold.units, seed, self.linears[0].weight.device))

    def columns(self, factors: Tensor) -> list[Change]:
        """The changes of the Linears that make up for a division by ``factors``."""
        return [(linear, "weight", lambda w: w * factors) for linear in self.linears]


def _powers_of_two(count: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(EXPONENTS), (count,), generator=generator)
    return (2.0 ** torch.tensor(EXPONENTS)[chosen]).to(device)


def find_folds(
    probe: Probe,
    groups: Sequence[ScaleGroup],
    linears: Mapping[str, nn.Linear],
    norms: Mapping[str, nn.Module],
    wanted: Sequence[bool],
) -> list[Fold | None]:
    """For each group that is ``wanted``, what takes its 1/s, proven: a norm of ``norms`` (by name) or an earlier Linear."""
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
    """For each candidate, whether folding random factors leaves the block's output what it was.

    All are first tried together, one by one only if that fails. Anything else that reads what a producer makes (a residual tap,
    another branch, a router) is not compensated, which shows at once.
    """
    if len(candidates) > 1 and leaves_unchanged(probe, candidates):
        return [True] * len(candidates)
    return [leaves_unchanged(probe, [candidate]) for candidate in candidates]


def leaves_unchanged(probe: Probe, candidates: Sequence[Candidate], arriving: bool = False) -> bool:
    """Whether folding random factors into all ``candidates`` leaves the block's output what it was.

    Factors without any effect would prove nothing. Those of each norm must change the output while nothing makes up for them.
    Those of a Linear must arrive at the group's input: ``find_rows`` saw that, or ``arriving`` asks for it here.
    """
    trial = [change for candidate in candidates for change in candidate.fold.trial()]
    factors = [candidate.random_factors(seed) for seed, candidate in enumerate(candidates)]
    fed = [i for i, candidate in enumerate(candidates) if arriving and isinstance(candidate.fold, LinearFold)]
    consumers = [candidates[i].linears[0] for i in fed]
    reference, xs = probe.watch(combined(trial), consumers) if trial or fed else (probe.reference, [])
    allowed = _EXACT * norm_of(reference)
    divided: list[Change] = []
    columns: list[Change] = []
    for candidate, its in zip(candidates, factors, strict=True):
        mine = candidate.fold.changes(its)
        silent = isinstance(candidate.fold, NormFold) and not (
            distance_of(probe.output(combined(trial + mine)), reference) > allowed
        )
        if silent:
            return False
        divided += mine
        columns += candidate.columns(its)
    output, seen = probe.watch(combined(trial + divided + columns), consumers)
    arrived = all(_arrived(x, y, factors[i]) for i, x, y in zip(fed, xs, seen, strict=True))
    return arrived and distance_of(output, reference) <= allowed


def _arrived(x: Tensor, seen: Tensor, factors: Tensor) -> bool:
    """Whether an input [rows, K] came divided by ``factors`` [K], in all channels that are not 0; there must be some."""
    if x.shape != seen.shape or not len(x):
        return False
    live = (x != 0).any(0)
    wanted = x.float() / factors
    fits = (seen.float() - wanted).norm(dim=0) <= _EXACT * wanted.norm(dim=0)
    return bool(live.any() and fits[live].all())


def prove_norm_fold(
    probe: Probe, norm: nn.Module, linears: Sequence[nn.Linear], readers: Readers = ()
) -> NormFold | None:
    """The kind of fold into ``norm`` that leaves the block's output unchanged, or None."""
    for kind in ("plain", "offset"):
        fold = NormFold(norm, kind, linears[0].in_features, tuple(readers))
        if _fits(norm, linears) and leaves_unchanged(probe, [Candidate(fold, tuple(linears))]):
            return fold
    return None


def prove_norm_folds(
    probe: Probe, fed: Sequence[tuple[nn.Module, Sequence[nn.Linear], Readers]]
) -> list[NormFold | None]:
    """For each norm, the Linears and the other parameters that read it, the proven fold, or None."""
    plain = [
        Candidate(NormFold(norm, "plain", linears[0].in_features, tuple(readers)), tuple(linears))
        for norm, linears, readers in fed
    ]
    if len(plain) > 1 and all(_fits(norm, linears) for norm, linears, _ in fed) and leaves_unchanged(probe, plain):
        return [candidate.fold for candidate in plain]
    return [prove_norm_fold(probe, *one) for one in fed]


def _fits(norm: nn.Module, linears: Sequence[nn.Linear]) -> bool:
    """Whether the norm's weight can cover the input channels, once or once for each head (BatchNorm over images cannot)."""
    return linears[0].in_features % len(norm.weight) == 0


def prove_linear_folds(
    probe: Probe,
    groups: Sequence[Sequence[nn.Linear]],
    wanted: Sequence[int],
    producers: Sequence[Sequence[nn.Linear]] | None = None,
) -> dict[int, LinearFold]:
    """For groups (by number, in calling order) whose input is proportional to rows of an earlier group's Linear, the proven fold.

    The nearest earlier Linear that fits and passes is taken; one Linear serves one group. producers: those of each group that may
    (None: all).
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
    """Like :func:`prove_linear_folds` for groups of one expert each, whose producer is another Linear of that expert.

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


def find_rows_of_all(
    probe: Probe,
    consumers: Mapping[int, nn.Linear],
    xs: Mapping[int, Tensor],
    producers: Mapping[int, nn.Linear],
) -> dict[int, Tensor]:
    """What :func:`find_rows` finds for each pair, in the runs that one pair needs: they must not be fed by one another."""
    subsets = {i: iter(_subsets(producer.out_features, consumers[i].in_features)) for i, producer in producers.items()}
    found: dict[int, Tensor] = {}
    number = 0
    while tried := {i: subset for i, rest in subsets.items() if (subset := next(rest, None)) is not None}:
        powers, changes = {}, []
        for i, subset in tried.items():
            device = xs[i].device
            tried[i] = subset.to(device)
            powers[i] = torch.ones(producers[i].out_features, device=device)
            powers[i][tried[i]] = _powers_of_two(len(subset), 1000 + number, device)
            every = torch.arange(producers[i].out_features, device=device)
            changes += LinearFold(producers[i], every).changes(1 / powers[i])
        for i, seen in zip(tried, probe.inputs([consumers[i] for i in tried], combined(changes)), strict=True):
            rows = _matching_rows(xs[i], seen, powers[i], tried[i]) if seen.shape == xs[i].shape else None
            if rows is not None:
                found[i] = rows
        subsets = {i: rest for i, rest in subsets.items() if i in tried and i not in found}
        number += 1
    return found


def find_rows(probe: Probe, consumer: nn.Linear, x: Tensor, producer: nn.Linear) -> Tensor | None:
    """Which output row of ``producer`` each input channel of ``consumer`` is proportional to: int64 [K], or None.

    x: the consumer's input [rows, K] with the real parameters. The producer's rows are multiplied by random powers of two; a
    channel that comes from a row by operations linear in it (or through ReLU) is multiplied by exactly that power, any other
    is not. Only some rows of a fused Linear (values of q, k, v; up of gate and up) are linear, so subsets are tried in turn.
    """
    return find_rows_of_all(probe, {0: consumer}, {0: x}, {0: producer}).get(0)


def _subsets(rows: int, channels: int) -> Iterator[Tensor]:
    """Sets of producer rows that may carry ``channels`` input channels.

    All of them; or (gate and up) either half; or the values of fused queries, keys and values, or keys and values: the last
    part of the rows, as a whole or of each head.
    """
    every = torch.arange(rows)
    if rows <= channels:
        if channels % rows == 0:
            yield every
        return
    if rows == 2 * channels:
        yield every[:channels]
    # as many values as channels, or (queries, keys, values with fewer key/value heads) rows = channels + 2 * values
    counts = [channels]
    if (rows - channels) % 2 == 0 and channels % ((rows - channels) // 2) == 0 and rows != 3 * channels:
        counts.append((rows - channels) // 2)
    for count in counts:
        common = math.gcd(rows, count)
        for heads in (h for h in range(1, common + 1) if common % h == 0):
            yield every.view(heads, -1)[:, -(count // heads) :].flatten()


def _matching_rows(x: Tensor, seen: Tensor, powers: Tensor, subset: Tensor) -> Tensor | None:
    exponents = torch.full((x.shape[1],), -128, device=x.device)
    live = (x != 0).any(0)
    for exponent in EXPONENTS:
        scaled = x.float() * 2.0**exponent
        fits = (seen.float() - scaled).norm(dim=0) <= _EXACT * scaled.norm(dim=0)
        exponents = torch.where(fits & live, exponent, exponents)
    if (exponents[live] == -128).any() or not live.any():
        return None
    of_row = powers.log2().round().long()
    for rows in _layouts(subset, x.shape[1]):
        if torch.equal(of_row[rows][live], exponents[live]):
            return rows
    return None


def _layouts(subset: Tensor, channels: int) -> Iterator[Tensor]:
    """Ways in which ``channels`` may come from a set of rows: one each, or heads repeated in place (grouped KV heads)."""
    count = len(subset)
    if count == channels:
        yield subset
        return
    if channels % count:
        return
    for head in (h for h in range(count, 0, -1) if count % h == 0):
        yield subset.view(-1, 1, head).expand(-1, channels // count, head).flatten()
