"""The kinds of layers in a report: which play the same part in different blocks, where they stand, and what to call them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .report import LayerReport

MOST_KINDS = 16  # more cannot be told apart in a plot
_WIDTH = 0.7  # of the distance of two blocks, taken by the experts of one


def depth_and_kind(name: str) -> tuple[int | None, str]:
    """``model.layers.3.mlp.up_proj`` -> (3, "mlp.up_proj"): the first number in a name is the block's; (None, name) without.

    Further numbers are those of experts, which are of one kind: ``3.experts.7.w1`` -> (3, "experts.*.w1").
    """
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit() and position + 1 < len(parts):
            return int(part), ".".join("*" if inner.isdigit() else inner for inner in parts[position + 1 :])
    return None, name


def by_kind(rows: Sequence[LayerReport]) -> dict[str, list[tuple[float, LayerReport]]]:
    """Layers that play the same part in different blocks, with their place on the x axis: the block, or the order."""
    places = [depth_and_kind(row.name) for row in rows]
    kinds: dict[str, list[tuple[float, LayerReport]]] = {}
    # numbers mean blocks only where they repeat: a chain 0, 2, 4 of layers is one series
    repeated = len({kind for _, kind in places}) < len(rows) and all(depth is not None for depth, _ in places)
    for order, (row, (depth, kind)) in enumerate(zip(rows, places, strict=True)):
        if repeated:
            kinds.setdefault(kind, []).append((depth, row))
        else:
            kinds.setdefault("layers", []).append((order, row))
    if len(kinds) > MOST_KINDS:  # too many to tell apart
        return {"layers": [(order, row) for order, row in enumerate(rows)]}
    return {kind: _spread(pairs) for kind, pairs in kinds.items()}


def short_names(kinds: Sequence[str]) -> dict[str, str]:
    """Each kind by the fewest of its last parts that tell it from the others: legends are narrow on a phone."""
    found = {}
    for kind in kinds:
        parts = kind.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        alone = (e for e in endings if e[0] != "*" and sum(f".{other}".endswith(f".{e}") for other in kinds) == 1)
        found[kind] = next(alone, kind)
    return found


def _spread(pairs: list[tuple[float, LayerReport]]) -> list[tuple[float, LayerReport]]:
    """Layers of one place (the experts of a block) side by side around it, in their order."""
    counts, seen = Counter(place for place, _ in pairs), Counter[float]()
    found = []
    for place, row in pairs:
        seen[place] += 1
        # the middles of as many equal parts of the width
        found.append((place + _WIDTH * ((seen[place] - 0.5) / counts[place] - 0.5), row))
    return found
