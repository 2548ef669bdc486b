"""Clips: which of those that lower their own Linear's error also serve the block."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from torch import Tensor, nn

from ..forwards.probe import Probe
from .solution import GroupSolution, LayerSolution


def settle_clips(probe: Probe, groups: Sequence[GroupSolution]) -> float:
    """Distance of the quantized block's output from the float one, clips that raise it taken back.

    Only with clip="auto": a clip lowers its own Linear's error, but may raise what the block makes of it (scores of
    queries and keys). Each layer in turn is tried without its clip, all others as they stand; experts of one kind together.
    """
    substitutes: dict[tuple[nn.Module, str], Tensor] = {}
    for layer in (layer for group in groups for layer in group.layers):
        substitutes |= layer.substitutes(layer.codes)
    best = probe.distance(substitutes)
    for unit in _clip_units(groups):
        layers = [layer for layer in unit if layer.unclipped_loss <= layer.limit]
        trial = dict(substitutes)
        for layer in layers:
            trial |= layer.substitutes(layer.unclipped)
        if not layers or (distance := probe.distance(trial)) >= best:
            continue
        best, substitutes = distance, trial
        for layer in layers:
            layer.codes, layer.unclipped, layer.loss = layer.unclipped, None, layer.unclipped_loss
    return best


def _clip_units(groups: Sequence[GroupSolution]) -> Iterator[list[LayerSolution]]:
    """Clipped layers with clip="auto" to be tried together: a layer alone, but experts by the dozen."""
    units: dict[Hashable, list[LayerSolution]] = {}
    for group in groups:
        for layer in group.layers:
            if layer.settings.clip == "auto" and layer.clipped:
                family = group.group.family or group.group.linears
                expert = layer.name in group.group.experts
                units.setdefault(family if expert else layer.name, []).append(layer)
    yield from units.values()
