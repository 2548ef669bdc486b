"""One forward of the first batch: the blocks in calling order, their scale groups, and why Linears stay float."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config import AwqConfig
from ..forwards.calls import CalibrationError, Call, run_call
from ..forwards.hooks import Hooks
from ..forwards.inputs import tensor_bytes
from ..forwards.lockstep import Block
from ..modules import norm_candidates
from ..undo import interrupt
from .blocks import blocks_found, blocks_named, linears_of
from .expert_groups import MixtureWatch
from .groups import ScaleGroup, Watch
from .mixtures import Mixture, find_mixtures
from .selection import Eligible


@dataclass(frozen=True)
class BlockSurvey:
    """A block as the first batch saw it; ``reasons``: why some of its Linears stay float; ``mixtures``: what may be experts."""

    block: Block
    linears: Mapping[str, nn.Linear]
    groups: Sequence[ScaleGroup]
    input_bytes: int
    reasons: Mapping[str, str] = field(default_factory=dict)
    mixtures: Sequence[Mixture] = ()


def survey_model(
    model: nn.Module, call: Call, eligible: Eligible, names: Sequence[str] | None, config: AwqConfig
) -> list[BlockSurvey]:
    """The blocks (found, or those called ``names``) as one batch sees them. CalibrationError if it reaches nothing."""
    mixtures = find_mixtures(model)
    blocks = blocks_found(model, call, mixtures) if names is None else blocks_named(model, names)

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


def survey(
    model: nn.Module,
    blocks: Sequence[Block],
    linears: Mapping[str, nn.Linear],
    call: Call,
    kind: Callable[[str], Hashable] = lambda _: None,
    mixtures: Sequence[Mixture] = (),
) -> list[BlockSurvey]:
    """Run the first batch through the whole model: the blocks in calling order, each with its scale groups.

    kind: Linears for whose names it differs are not put into one group. mixtures: what may be experts.

    A block that is called twice in one forward cannot be finished after its first call: then the whole model counts as one
    block. Raises CalibrationError when the model rejects the batch.
    """
    order: list[Block] = []
    sizes: dict[str, int] = {}
    watches = {block.name: Watch() for block in blocks}
    tokens = {
        b.name: MixtureWatch([m for m in mixtures if len(linears_of(b, m.linears)) == len(m.linears)]) for b in blocks
    }

    def entered(block: Block, *inputs: Any) -> None:
        interrupt.check()
        order.append(block)
        sizes[block.name] = tensor_bytes(inputs)

    with Hooks() as on:
        for block in blocks:
            inside = linears_of(block, linears)
            norms = {f"{block.name}.{n}" if block.name else n: m for n, m in norm_candidates(block.module).items()}
            on.enter_context(watches[block.name].on(inside, norms))
            on.enter_context(tokens[block.name].on(norms))
            on.input(block.module, partial(entered, block))
            on.output(block.module, lambda _, watch=watches[block.name]: watch.release())
        with torch.no_grad():
            # on copies: a model that writes its input must find the batch untouched when it is calibrated
            run_call(model, call.on_copies(), 0)
    if len({block.name for block in order}) < len(order):
        return survey(model, [Block("", model)], linears, call, kind, mixtures)
    found = []
    for block in order:
        inside = linears_of(block, linears)
        groups = watches[block.name].groups(inside, kind)
        groups = tokens[block.name].join(groups, watches[block.name], inside, kind)
        reasons = tokens[block.name].reasons
        inside = {name: linear for name, linear in inside.items() if name not in reasons}
        worked_on = [mixture for mixture in tokens[block.name].mixtures if mixture.linears.keys() & inside.keys()]
        found.append(BlockSurvey(block, inside, groups, sizes[block.name], reasons, worked_on))
    return found


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
