"""Origin: which output row of an earlier Linear each input channel of a Linear comes from, by random powers of two.

Factors are powers of two because multiplying by them is exact: what comes back multiplied shows which row it was made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..forwards.probe import Probe, combined
from .fold import LinearFold

# What exact arithmetic may still differ by: products that underflow in half precision.
EXACT = 2.0**-20
# None is 0: a factor of 1 would show nothing.
EXPONENTS = (-2, -1, 1, 2)


def powers_of_two(count: int, seed: int, device: torch.device) -> Tensor:
    """Random factors fp32 [count], with these EXPONENTS."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(EXPONENTS), (count,), generator=generator)
    return (2.0 ** torch.tensor(EXPONENTS)[chosen]).to(device)


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
            powers[i][tried[i]] = powers_of_two(len(subset), 1000 + number, device)
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
        fits = (seen.float() - scaled).norm(dim=0) <= EXACT * scaled.norm(dim=0)
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
