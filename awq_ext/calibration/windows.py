"""Batches of token ids alone: which calls are that, and how they are made to hold no more than so many tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..forwards.calls import Call
from .extra_batches import holds_ids

# Windows are not cut shorter than that: the first tokens of a text have little context, and their activations are unusual.
SHORTEST = 128
_HINT = " max_calib_tokens has shortened it or left windows out: 0 leaves all as they are given."


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


def count_tokens(calls: Sequence[Call]) -> int:
    """Add up the token ids of calls, without those that a mask leaves out; calls of anything else count 0."""
    return sum(sum(_counts(call)) for call in calls if place_of_ids(call) is not None)


def can_be_cut(call: Call) -> bool:
    """Tell whether a call holds nothing but token ids, and masks of their shape."""
    if place_of_ids(call) is None:
        return False
    shape = ids_of(call).shape
    return all(isinstance(value, Tensor) and value.shape == shape for value in call.kwargs.values())


def at_most(calls: Sequence[Call], tokens: int) -> list[Call]:
    """Shorten calls to ``tokens`` token ids in all, 0 is no limit: what is left shows every part of the texts.

    All windows are cut at their end by the same share, but not below ``SHORTEST``, nor where a mask leaves tokens out. If they are
    still too many, evenly spaced ones stay, at least one, whatever its length. Ids that a mask leaves out do not count. Calls of
    anything but token ids and masks of their shape are not limited.
    """
    if not tokens or not calls or not all(map(can_be_cut, calls)) or count_tokens(calls) <= tokens:
        return list(calls)
    share = _share(calls, tokens)
    short = [_shorter(call, share) for call in calls]
    counts = {(place, row): n for place, call in enumerate(short) for row, n in enumerate(_counts(call))}
    by_call: dict[int, list[int]] = {}
    for place, row in _spaced(counts, tokens):
        by_call.setdefault(place, []).append(row)
    kept = [_parts(short[place], torch.tensor(found)) for place, found in by_call.items()]
    return [replace(call, hint=call.hint + _HINT) for call in kept]


def _counts(call: Call) -> list[int]:
    """Count the ids of each window of a call, without those that a mask of their shape leaves out."""
    ids = ids_of(call)
    kept = torch.ones_like(ids, dtype=torch.bool)
    for mask in call.masks:
        if mask.shape == ids.shape:
            kept &= mask != 0
    return kept.sum(1).tolist()


def _spaced(counts: Mapping[tuple[int, int], int], tokens: int) -> list[tuple[int, int]]:
    """Choose as many evenly spaced windows as have ``tokens`` ids together, at least one."""
    windows, kept = list(counts), len(counts)
    while True:
        chosen = [windows[i * len(windows) // kept] for i in range(kept)]
        seen = sum(counts[window] for window in chosen)
        if seen <= tokens or kept == 1:
            return chosen
        kept = max(min(kept - 1, kept * tokens // seen), 1)


def _share(calls: Sequence[Call], tokens: int) -> float:
    """Find by which share windows must be cut so that, with those that cannot be cut so far, ``tokens`` ids are left."""
    whole = 0
    lengths = []
    for call in calls:
        if _is_padded(call):
            whole += sum(_counts(call))
        else:
            lengths += [ids_of(call).shape[1]] * len(ids_of(call))
    # from the shortest on, windows that would fall below the floor are left at it, and the others cut more for it
    lengths.sort()
    rest = sum(lengths)
    for length in lengths:
        share = max(tokens - whole, 0) / rest
        if length * share >= min(length, SHORTEST):
            return share
        whole, rest = whole + min(length, SHORTEST), rest - length
    return 0.0


def _is_padded(call: Call) -> bool:
    return any(not mask.all() for mask in call.masks)


def _shorter(call: Call, share: float) -> Call:
    """Cut the ends of a call's windows off."""
    length = ids_of(call).shape[1]
    if _is_padded(call):
        return call
    return _parts(call, slice(None), max(int(length * share), min(length, SHORTEST)))


def _parts(call: Call, rows: Tensor | slice, length: int | None = None) -> Call:
    """Take rows, and the first ``length`` tokens of each, of all tensors of a call: each is [B, T]."""
    args = tuple(one[rows, :length] for one in call.args)
    return replace(call, args=args, kwargs={name: one[rows, :length] for name, one in call.kwargs.items()})
