"""The choice of clips: of those that lower their own Linear's error, the ones that do not raise the block's."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..forwards.probe import Probe
from .solution import GroupSolution, LayerSolution


def keep_clips_that_serve(probe: Probe, groups: Sequence[GroupSolution]) -> tuple[list[GroupSolution], float]:
    """Take back the clips that raise the error of the block's output; also return its distance from the float output.

    Only with clip="auto". A clip lowers its own Linear's error, but may raise that of the block (through the attention scores,
    for example). Each layer in turn is tried without its clip while the others stay; experts of one kind are tried together.
    """
    kept = {layer.task.name: layer for group in groups for layer in group.layers}
    substitutes: dict[tuple[nn.Module, str], Tensor] = {}
    for layer in kept.values():
        substitutes |= layer.substitutes()
    best = probe.distance(substitutes)
    for unit in _clip_units(groups):
        layers = [layer.unclipped for layer in unit if layer.unclipped.loss <= layer.limit]
        trial = dict(substitutes)
        for layer in layers:
            trial |= layer.substitutes()
        if layers and (distance := probe.distance(trial)) < best:
            best, substitutes = distance, trial
            kept |= {layer.task.name: layer for layer in layers}
    return [replace(one, layers=tuple(kept[layer.task.name] for layer in one.layers)) for one in groups], best


def _clip_units(groups: Sequence[GroupSolution]) -> list[list[LayerSolution]]:
    """List the clipped layers with clip="auto" in units that are tried together: all experts of one kind, or a single layer."""
    units: dict[Hashable, list[LayerSolution]] = {}
    for group in groups:
        family = group.task.group.family or group.task.group.linears
        for layer in group.layers:
            if layer.task.settings.clip == "auto" and layer.clipped:
                expert = layer.task.name in group.task.group.experts
                units.setdefault(family if expert else layer.task.name, []).append(layer)
    return list(units.values())
