"""Count what weights take when they are packed: codes, and a scale and a zero for each group."""

from __future__ import annotations

from collections.abc import Iterable

from .report import LayerReport


def group_bits(bits: int) -> int:
    """Count the bits of a group's scale, two bytes, and zero: half a byte, or a whole one for codes of more than 4 bits."""
    return 20 if bits <= 4 else 24


def packed_bytes(in_features: int, out_features: int, group_size: int, bits: int) -> int:
    """Compute the packed size of a weight [out_features, in_features]; the short last group of a row counts as one."""
    groups = 1 if group_size < 1 else -(-in_features // group_size)
    return -(-out_features * (in_features * bits + group_bits(bits) * groups) // 8)


def linear_bytes(layer: LayerReport) -> int:
    """Compute the packed size of a Linear."""
    return packed_bytes(layer.in_features, layer.out_features, layer.group_size, layer.bits)


def stored_bits(layers: Iterable[LayerReport]) -> float:
    """Compute the bits that a weight of quantized ``layers`` takes on average, scales and zeros counted; 0 without weights."""
    rows = list(layers)
    weights = sum(row.in_features * row.out_features for row in rows)
    return 8 * sum(map(linear_bytes, rows)) / weights if weights else 0.0
