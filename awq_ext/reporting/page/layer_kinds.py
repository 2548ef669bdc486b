"""Sort the layers of a report into kinds, each of one colour and one marker, and give each a place on the x axis."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..report import LayerReport

_WIDTH = 0.7  # of the distance of two blocks, taken by the layers of one kind in it


@dataclass(frozen=True)
class Style:
    """How a kind is drawn: the colour on light and on dark ground (each told from its ground by 3:1 or more), and the marker."""

    light: str
    dark: str
    marker: str


KINDS = {
    "q": Style("#0063a8", "#5cb3f0", "o"),
    "k": Style("#c2410c", "#ff9a62", "s"),
    "v": Style("#00795c", "#3fc79a", "^"),
    "o": Style("#a83279", "#f08cc4", "D"),
    "gate": Style("#6b46c1", "#b79cf7", "v"),
    "up": Style("#8a6100", "#e3b341", "P"),
    "down": Style("#b3001b", "#ff7b86", "X"),
    "experts": Style("#007a8a", "#4dd0e1", "*"),
    "head": Style("#1c2733", "#f4f7fa", "p"),
    "other": Style("#5b6770", "#a3b0bb", "d"),
}
_HEADS = re.compile(r"(lm_)?head|embed_out|output|classifier|score")
_EXPERT = re.compile(r"(^|\.)experts?(\.|$)")
_ATTENTION = re.compile(r"att|(^|\.)h?mha(\.|$)", re.IGNORECASE)
# what the last part of a name says; the first that fits. One layer for q, k and v counts as q, one for gate and up as gate
_BY_NAME = (
    ("q", re.compile(r"q|qkv|wqkv|c_attn|query.*|q_.*|wq|qkv_.*|to_q|in_proj_qkv|to_qkv", re.IGNORECASE)),
    ("k", re.compile(r"k|key|k_.*|wk|kv_.*|to_k|kv", re.IGNORECASE)),
    ("v", re.compile(r"v|value|v_.*|wv|to_v", re.IGNORECASE)),
    ("gate", re.compile(r"gate_.*|w1|wi_0|fc1_g|gate_up_proj", re.IGNORECASE)),
    ("up", re.compile(r"up|up_proj|w3|wi|wi_1|fc1|c_fc|lin1|fc_in|dense_h_to_4h|linear1", re.IGNORECASE)),
    ("down", re.compile(r"down|down_proj|w2|fc2|lin2|fc_out|dense_4h_to_h|linear2", re.IGNORECASE)),
)
# names that mean another thing in attention: there, otherwise
_BY_PLACE = {
    "c_proj": ("o", "down"),
    "wo": ("o", "down"),
    "o_proj": ("o", "o"),
    "o": ("o", "down"),
    "out_proj": ("o", "other"),
    "to_out": ("o", "o"),
    "dense": ("o", "other"),
    "proj": ("o", "other"),
}


def depth_of(name: str) -> int | None:
    """Find the number of the block in a layer's name, the first number in it: ``model.layers.3.mlp.up_proj`` -> 3; None without."""
    return next((int(part) for part in name.split(".")[:-1] if part.isdigit()), None)


def kind_of(name: str) -> str:
    """Name the part that a layer plays, one of ``KINDS``, by the names that models commonly use."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    last = parts[-1] if parts else ""
    if _EXPERT.search(name):
        return "experts"
    if depth_of(name) is None and _HEADS.fullmatch(last):
        return "head"
    if last in _BY_PLACE:
        attention, elsewhere = _BY_PLACE[last]
        return attention if _ATTENTION.search(name) else _bert(parts, elsewhere)
    return next((kind for kind, pattern in _BY_NAME if pattern.fullmatch(last)), "other")


def _bert(parts: Sequence[str], otherwise: str) -> str:
    """Tell the two layers called dense of an MLP that BERT made usual: intermediate.dense and output.dense."""
    return {("intermediate", "dense"): "up", ("output", "dense"): "down"}.get(tuple(parts[-2:]), otherwise)


def by_kind(rows: Sequence[LayerReport]) -> dict[str, list[tuple[float, LayerReport]]]:
    """Group layers by kind, in the order of ``KINDS``, each with its place on the x axis.

    The place is the block's number; layers outside of blocks lie before or behind them. Where names tell of no blocks, it is the
    number in calling order.
    """
    found: dict[str, list[tuple[float, LayerReport]]] = {kind: [] for kind in KINDS}
    for place, row in zip(_places(rows), rows, strict=True):
        found[kind_of(row.name)].append((place, row))
    return {kind: _spread(pairs) for kind, pairs in found.items() if pairs}


def in_blocks(rows: Sequence[LayerReport]) -> bool:
    """Tell whether numbers in the names are blocks: they are where names repeat but for them, unlike a chain 0, 2, 4."""
    inner = [re.sub(r"\d+", "*", row.name) for row in rows if depth_of(row.name) is not None]
    return len(set(inner)) < len(inner)


def place_name(row: LayerReport) -> str:
    """Name a layer shortly, for a label in a plot: ``model.layers.3.mlp.up_proj`` -> ``3 up``; without a block its own name."""
    depth, kind = depth_of(row.name), kind_of(row.name)
    own = row.name.split(".")
    if depth is None:
        return ".".join(own[-2:])
    inner = own[own.index(str(depth)) + 1 :] if str(depth) in own else own[-1:]
    if kind == "experts":
        return f"{depth} " + ".".join(inner[inner.index("experts") if "experts" in inner else 0 :])
    return f"{depth} {kind if kind != 'other' else '.'.join(inner[-2:])}"


def _places(rows: Sequence[LayerReport]) -> list[float]:
    if not in_blocks(rows):
        return [float(order) for order in range(len(rows))]
    depths = [depth_of(row.name) for row in rows]
    known = [depth for depth in depths if depth is not None]
    first = next(i for i, depth in enumerate(depths) if depth is not None)
    return [
        float(depth if depth is not None else -1 if i < first else max(known) + 1) for i, depth in enumerate(depths)
    ]


def _spread(pairs: list[tuple[float, LayerReport]]) -> list[tuple[float, LayerReport]]:
    """Put layers of one place (the experts of a block) side by side around it, in their order."""
    counts, seen = Counter(place for place, _ in pairs), Counter[float]()
    found = []
    for place, row in pairs:
        seen[place] += 1
        # the middles of as many equal parts of the width
        found.append((place + _WIDTH * ((seen[place] - 0.5) / counts[place] - 0.5), row))
    return found
