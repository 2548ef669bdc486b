"""The choice of clips: of those that lower their own Linear's error, the ones that do not raise the block's."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..folding.fold import LinearFold
from ..forwards.probe import Probe
from .solution import GroupSolution, LayerSolution, substitutes_of


def keep_clips_that_serve(probe: Probe, groups: Sequence[GroupSolution]) -> tuple[list[GroupSolution], float]:
    """Take back the clips that raise the error of the block's output; also return its distance from the float output.

    Only with clip="auto". A clip lowers its own Linear's error, but may raise that of the block (through the attention scores,
    for example). Each layer in turn is tried without its clip while the others stay; experts of one kind are tried together. Those
    that can be sketched are tried on sketches first, and solved without their clip only if that lowers the error there.
    """
    kept = {layer.task.name: layer for group in groups for layer in group.layers}
    with probe.recalling():
        units = _doubtful(probe, kept, _clip_units(groups))
    substitutes = substitutes_of(kept.values())
    with probe.recalling():
        best = probe.distance(substitutes)
        for unit in units:
            layers = [layer for layer in (one.unclipped.solve() for one in unit) if layer.loss <= layer.limit]
            trial = substitutes | substitutes_of(layers)
            if layers and (distance := probe.distance(trial)) < best:
                best, substitutes = distance, trial
                kept |= {layer.task.name: layer for layer in layers}
    return [replace(one, layers=tuple(kept[layer.task.name] for layer in one.layers)) for one in groups], best


def _doubtful(
    probe: Probe, solved: Mapping[str, LayerSolution], units: Sequence[list[LayerSolution]]
) -> list[list[LayerSolution]]:
    """Select the units without whose clips the block's output may be closer to the float one: by sketches, where there are any."""
    layers = [layer for unit in units for layer in unit if layer.unclipped.sketches]
    if not _sketches_pay(probe, [layer.task.weight for layer in layers]):
        return list(units)
    sketches = {layer.task.name: layer.unclipped.sketches() for layer in layers}
    clipped = {name: pair[0] for name, pair in sketches.items()}
    substitutes = substitutes_of({**solved, **clipped}.values())
    best = probe.distance(substitutes)
    found = []
    for unit in units:
        full = [sketches[layer.task.name][1] for layer in unit if layer.task.name in sketches]
        trial = substitutes | substitutes_of(full)
        if full and (distance := probe.distance(trial)) >= best:
            continue
        if full:
            best, substitutes = distance, trial
        found.append(unit)
    return found


def _sketches_pay(probe: Probe, weights: Sequence[Tensor]) -> bool:
    """Tell whether it saves time to solve only some of the ``weights`` without a clip.

    To solve one takes about as long as a forward of K tokens through it. Sketches cost up to two more forwards of the block.
    """
    # a scalar among the outputs, such as a loss, has no rows
    tokens = max((one.numel() // one.shape[-1] for one in probe.reference if one.numel() and one.dim()), default=0)
    return sum(w.numel() * w.shape[1] for w in weights) > 2 * tokens * sum(w.numel() for w in weights)


def _clip_units(groups: Sequence[GroupSolution]) -> list[list[LayerSolution]]:
    """List the clipped layers with clip="auto" in units that are tried together: all experts of one kind, or a single layer.

    Not those whose 1/s is in the rows of another Linear (o behind v, down behind up): what they put out is added to the block's
    output, so a clip that lowers their own error, over all tokens, lowers the block's. A trial on the few tokens of one batch would
    only add noise.
    """
    units: dict[Hashable, list[LayerSolution]] = {}
    for group in groups:
        if isinstance(group.fold, LinearFold):
            continue
        family = group.task.group.family or group.task.group.linears
        for layer in group.layers:
            if layer.task.settings.clip == "auto" and layer.clipped:
                expert = layer.task.name in group.task.group.experts
                units.setdefault(family if expert else layer.task.name, []).append(layer)
    return list(units.values())
