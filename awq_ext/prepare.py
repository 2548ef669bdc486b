"""What comes before any work on a model, for quantize() and plan() alike: the layers, the blocks, the memory it will take."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any, NoReturn

import torch
from torch import nn

from . import interrupt
from .batches import Call
from .blocks import Block, CalibrationError, blocks_around, copy_inputs, find_blocks, run_call
from .calibrate import BlockSurvey, linears_of, survey
from .config import AwqConfig
from .experts import ROUTER
from .fused import find_fused, routers_beside
from .groups import Eligible, eligible_linears, norm_candidates, parameter_owners
from .journal import Journal
from .mixture import Mixture, MixtureWatch, find_mixtures
from .selection import reason_to_skip
from .standins import StandIns, stand_in, transposed_layers


def unwrapped(model: nn.Module) -> nn.Module:
    """The module behind ``torch.compile(model)``, under whose names everything goes; any other module itself."""
    return model._orig_mod if isinstance(getattr(model, "_orig_mod", None), nn.Module) else model


def check_layers(model: nn.Module, config: AwqConfig) -> torch.device:
    """The device of the weights to quantize. ValueError if ``config`` leaves none, before a single sample is read."""
    if type(model) is nn.Linear:
        raise ValueError(
            "model is a bare Linear, which has no place to put another layer: wrap it, nn.Sequential(linear)"
        )
    excluded = reason_to_skip(model, config)
    eligible = eligible_linears(model, excluded)
    weights = [linear.weight for linear in eligible.linears.values()]
    weights += [fused.original for fused in find_fused(model, excluded) if not fused.reason]
    weights += [module.weight for name, module in transposed_layers(model).items() if not excluded(name, module)]
    if not weights:
        _refuse(model, eligible)
    return weights[0].device


def _refuse(model: nn.Module, eligible: Eligible) -> NoReturn:
    if not eligible.reasons:
        raise ValueError(f"{type(model).__name__} has no nn.Linear: there is nothing to quantize")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in eligible.reasons.items())
    raise ValueError(f"no Linear is left to quantize: {reasons}")


def select_linears(model: nn.Module, call: Call, config: AwqConfig, journal: Journal) -> tuple[Eligible, StandIns]:
    """The Linears that ``config`` wants quantized, and what some of them stand in for.

    ValueError if there is none, or a ``per_layer`` pattern fits none.
    """
    excluded = reason_to_skip(model, config)
    standins = stand_in(model, call, excluded, journal, calibration_mode)
    eligible = eligible_linears(model, excluded)
    eligible.reasons |= standins.unfused.reasons
    for name in routers_beside(model) & eligible.linears.keys():
        del eligible.linears[name]
        eligible.reasons[name] = ROUTER
    if not eligible.linears:
        _refuse(model, eligible)
    for pattern in config.per_layer:
        if not any(fnmatchcase(name, pattern) for name in eligible.linears):
            raise ValueError(
                f"AwqConfig.per_layer[{pattern!r}] fits none of the {len(eligible.linears)} Linears to quantize, "
                f"such as {next(iter(eligible.linears))}"
            )
    return eligible, standins


def survey_model(
    model: nn.Module, call: Call, eligible: Eligible, names: Sequence[str] | None, config: AwqConfig
) -> list[BlockSurvey]:
    """The blocks (found, or those called ``names``) as one batch sees them. CalibrationError if it reaches nothing."""
    mixtures = find_mixtures(model)
    blocks = _found_blocks(model, call, mixtures) if names is None else _named_blocks(model, names)

    def kind(name: str) -> tuple[str, bool]:
        # Linears of one input that are treated differently cannot share a scale
        settings = config.for_layer(name)
        return settings.method, settings.packed

    surveys = survey(model, blocks, eligible.linears, call, kind, mixtures)
    called = {s.block.name for s in surveys}
    if names and "" not in called and (unseen := {block.name for block in blocks} - called):
        raise CalibrationError(f"the first calibration batch did not call the given blocks {', '.join(sorted(unseen))}")
    if not any(s.groups for s in surveys):
        first = next(iter(eligible.linears))
        why = next((f" ({s.reasons[first]})" for s in surveys if first in s.reasons), "")
        raise CalibrationError(
            "the first calibration batch reached no Linear that can be quantized: "
            f"{len(eligible.linears)} are eligible, among them {first}{why}"
        )
    return surveys


def _found_blocks(model: nn.Module, call: Call, mixtures: Sequence[Mixture]) -> list[Block]:
    """The repeated blocks; where these are the experts of a model's only layer, what is around them."""
    blocks = find_blocks(model)
    spread = [m for m in mixtures if m.routers and sum(bool(linears_of(block, m.linears)) for block in blocks) > 1]
    if not spread:
        return blocks
    watch = MixtureWatch(spread)
    with watch.on(norm_candidates(model)), torch.no_grad():
        run_call(model, Call(copy_inputs(call.args), copy_inputs(call.kwargs)), 0)
    return blocks_around(model, blocks, [mixture.owner for mixture in watch.shown()])


def _named_blocks(model: nn.Module, names: Sequence[str]) -> list[Block]:
    if isinstance(names, str):
        raise TypeError(f"blocks={names!r}: a sequence of module names is needed")
    modules = dict(model.named_modules(remove_duplicate=False))
    for position, name in enumerate(names):
        if name not in modules:
            raise ValueError(f"blocks: {type(model).__name__} has no module {name!r}")
        for other in names[:position]:
            if f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                raise ValueError(f"blocks: {other!r} and {name!r} overlap")
    return [Block(name, modules[name]) for name in names] or [Block("", model)]


def planned_bytes(surveys: Sequence[BlockSurvey], growth: float, config: AwqConfig) -> int:
    """Memory that quantizing adds to what one plain forward of the first batch needs.

    Hidden states of all batches (``growth`` times the first one's) at one block boundary + statistics of the largest block +
    the new layers made so far (the float ones stay until the end, so that everything can be taken back) + scratch of one
    block: its largest second moment packed for the kernels (and factored, where errors are fed back), its quantized weights in
    float for trials, its codes twice (with and without clips).
    """
    hidden = max(s.input_bytes for s in surveys) * growth
    statistics = max(s.statistics_bytes + _centred_bytes(s, config) for s in surveys)
    weights = {name: linear.weight for s in surveys for name, linear in s.linears.items()}
    made = sum(0.6 * w.numel() if config.for_layer(name).packed else w.nbytes for name, w in weights.items())
    # the factor; the whole moment in panels for refining; and damped, for the clips
    widths = [m.in_features for s in surveys for n, m in s.linears.items() if config.for_layer(n).feeds_back]
    factored = 12 * max(widths, default=0) ** 2
    return int(hidden + statistics + made + factored + max(s.scratch_bytes for s in surveys))


def _centred_bytes(surveyed: BlockSurvey, config: AwqConfig) -> int:
    """Second moments around the mean, one for each input of a Linear whose bias takes over the mean's error."""
    parts = [part for group in surveyed.groups for part in group.inputs]
    inputs = {part[0]: [surveyed.linears[n] for n in part if config.for_layer(n).corrects_bias] for part in parts}
    return sum(4 * ls[0].in_features ** 2 for ls in inputs.values() if any(one.bias is not None for one in ls))


def growth_of(calls: Sequence[Call]) -> float:
    """How many times the first batch all batches are, in elements."""
    return sum(call.elements for call in calls) / max(calls[0].elements, 1)


def foldable_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Norm candidates whose parameters belong to them alone, by name."""
    owners = parameter_owners(model)
    return {
        name: module
        for name, module in norm_candidates(model).items()
        if all(len(owners[id(p)]) == 1 for p in module.parameters())
    }


def reasons_to_stay(eligible: Eligible, surveys: Sequence[BlockSurvey]) -> dict[str, str]:
    """Why each Linear that no scale group holds stays float."""
    inside = {name for s in surveys for name in linears_of(s.block, eligible.linears)}
    grouped = {name for s in surveys for group in s.groups for name in group.linears}
    routers = {name: reason for s in surveys for name, reason in s.reasons.items()}
    return (
        eligible.reasons
        | routers
        | {
            name: "not called by the first calibration batch" if name in inside else "outside the calibrated blocks"
            for name in eligible.linears
            if name not in grouped and name not in routers
        }
    )


def _eager() -> AbstractContextManager[Any]:
    """A compiled forward would be traced anew for every hook and every weight that is tried."""
    # importing dynamo takes seconds, and what was compiled has imported it
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """eval mode, nothing compiled, and no key/value cache where there is a switch (every suspended forward would hold one).

    A Ctrl-C comes where :func:`awq_ext.interrupt.check` is called, or once all is as it was.
    """
    with interrupt.held():
        training = [(name, module, module.training) for name, module in model.named_modules()]
        owners = {id(c): c for m in model.modules() if getattr(c := getattr(m, "config", None), "use_cache", None)}
        # an encoder and a decoder may have one each
        caching = [(config, config.use_cache) for config in owners.values()]
        try:
            model.eval()
            for config, _ in caching:
                config.use_cache = False
            with _eager():
                yield
        finally:
            # by name too: a module that took the place of another takes over its flag
            for name, module, flag in training:
                module.training = model.get_submodule(name).training = flag
            for config, use_cache in caching:
                config.use_cache = use_cache
