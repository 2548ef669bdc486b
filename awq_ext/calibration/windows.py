"""Batches of token ids alone: which calls are that, and how they are made to hold no more than so many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..forwards.calls import Call
from .extra_batches import holds_ids

# Windows are not cut shorter than that: the first tokens of a text have little context, and their activations are unusual.
SHORTEST = 128


def place_of_ids(call: Call) -> str | None:
    """Name the keyword of the token ids [B, T], "" where they are the only argument; None if there is more than these and masks."""
    values = {"": call.args[0]} if len(call.args) == 1 else {}
    values |= {name: value for name, value in call.kwargs.items() if not name.endswith("attention_mask")}
    if len(values) != 1 or len(call.args) > 1:
        return None
    name, value = values.popitem()
    return name if holds_ids(value) else None


def ids_of(call: Call) -> Tensor:
    """Return the token ids [B, T] of a call that has a place for them."""
    return call.args[0] if call.args else call.kwargs[place_of_ids(call)]


def at_most(calls: Sequence[Call], tokens: int) -> list[Call]:
    """Shorten calls to about ``tokens`` token ids in all, 0 is no limit: what is left shows every part of the texts.

    All windows are cut at their end by the same share, but not below ``SHORTEST``, nor where a mask leaves tokens out. If they are
    still too many, evenly spaced ones stay, at least one. Calls of anything but token ids and masks of their shape are not limited.
    """
    if not tokens or not calls or not all(map(_can_be_cut, calls)) or _count(calls) <= tokens:
        return list(calls)
    share = tokens / _count(calls)
    short = [_shorter(call, share) for call in calls]
    rows = [(place, row) for place, call in enumerate(short) for row in range(len(ids_of(call)))]
    kept = min(max(int(len(rows) * tokens / _count(short)), 1), len(rows))
    chosen = [rows[i * len(rows) // kept] for i in range(kept)]
    by_call = {place: [row for other, row in chosen if other == place] for place, _ in chosen}
    return [_parts(short[place], torch.tensor(found)) for place, found in by_call.items()]


def _count(calls: Sequence[Call]) -> int:
    return sum(ids_of(call).numel() for call in calls)


def _can_be_cut(call: Call) -> bool:
    if place_of_ids(call) is None:
        return False
    shape = ids_of(call).shape
    return all(isinstance(value, Tensor) and value.shape == shape for value in call.kwargs.values())


def _shorter(call: Call, share: float) -> Call:
    """Cut the ends of a call's windows off."""
    length = ids_of(call).shape[1]
    if any(not mask.all() for mask in call.masks):
        return call
    return _parts(call, slice(None), max(int(length * share), min(length, SHORTEST)))


def _parts(call: Call, rows: Tensor | slice, length: int | None = None) -> Call:
    """Take rows, and the first ``length`` tokens of each, of all tensors of a call: each is [B, T]."""
    args = tuple(one[rows, :length] for one in call.args)
    return replace(call, args=args, kwargs={name: one[rows, :length] for name, one in call.kwargs.items()})
