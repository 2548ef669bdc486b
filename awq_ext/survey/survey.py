"""The survey of a model by one forward of the first batch: blocks in calling order, their scale groups, what stays float."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..config import AwqConfig
from ..forwards.calls import CalibrationError, Call, run_call
from ..forwards.hooks import Hooks
from ..forwards.inputs import tensor_bytes
from ..forwards.lockstep import Block
from ..modules import heads_among, norm_candidates
from ..undo import interrupt
from .blocks import blocks_found, blocks_named, linears_of
from .expert_groups import MixtureWatch
from .groups import ScaleGroup, Watch
from .mixtures import Mixture, find_mixtures
from .selection import Eligible


@dataclass(frozen=True)
class BlockSurvey:
    """A block as the first batch shows it.

    input_bytes: of what it is called with. reasons: why some of its Linears stay float. mixtures: what may be experts.
    widest_bytes: of the largest tensor that one of its Linears reads or returns. kept_bytes: of what the first block was called
    with and the model still holds, such as embeddings in a variable.
    """

    block: Block
    linears: Mapping[str, nn.Linear]
    groups: Sequence[ScaleGroup]
    input_bytes: int
    reasons: Mapping[str, str] = field(default_factory=dict)
    mixtures: Sequence[Mixture] = ()
    widest_bytes: int = 0
    kept_bytes: int = 0


def survey_model(
    model: nn.Module, call: Call, eligible: Eligible, names: Sequence[str] | None, config: AwqConfig
) -> list[BlockSurvey]:
    """Survey the blocks (found, or those called ``names``) by one batch; raise CalibrationError if it reaches no Linear."""
    mixtures = find_mixtures(model)
    blocks = blocks_found(model, call, mixtures) if names is None else blocks_named(model, names)
    if names is None and config.head != "float":  # it lies behind the blocks, and would be left out
        heads = heads_among(model, eligible.linears)
        blocks += [Block(name, head) for name, head in heads.items() if not any(linears_of(b, heads) for b in blocks)]

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


class _BlockWatch:
    """Watches a block while the first batch runs through the whole model."""

    def __init__(self, block: Block, linears: Mapping[str, nn.Linear], mixtures: Sequence[Mixture]) -> None:
        self.block = block
        self._linears = linears_of(block, linears)
        self._watch = Watch()
        self._experts = MixtureWatch([m for m in mixtures if linears_of(block, m.linears) == m.linears])
        self._input_bytes = self._widest_bytes = self._kept_bytes = 0
        self._inputs: list[weakref.ref[Tensor]] = []

    def put_on(self, on: Hooks, order: list[_BlockWatch]) -> None:
        """Add the hooks, one of which notes in ``order`` that the block was called."""

        def entered(*inputs: Any) -> None:
            interrupt.check()
            order.append(self)
            self._input_bytes = tensor_bytes(inputs)
            tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
            self._inputs = [weakref.ref(tensor) for tensor in tensors]
            own = {id(tensor) for tensor in tensors}
            kept = (tensor for one in order[0]._inputs if (tensor := one()) is not None)
            self._kept_bytes = sum(tensor.nbytes for tensor in kept if id(tensor) not in own)

        name, module = self.block.name, self.block.module
        norms = {f"{name}.{inner}" if name else inner: norm for inner, norm in norm_candidates(module).items()}
        on.enter_context(self._watch.on(self._linears, norms))
        on.enter_context(self._experts.on(norms))
        on.input(module, entered)
        on.output(module, lambda _: self._watch.release())
        for linear in self._linears.values():
            on.output(linear, partial(self._measure, linear))

    def _measure(self, linear: nn.Linear, output: Any) -> None:
        channels = max(1, linear.in_features / linear.out_features)
        self._widest_bytes = max(self._widest_bytes, int(channels * tensor_bytes(output)))

    def survey(self, kind: Callable[[str], Hashable]) -> BlockSurvey:
        """Return what was seen."""
        groups = self._watch.groups(self._linears, kind)
        groups = self._experts.join(groups, self._watch, self._linears, kind)
        reasons = self._experts.reasons
        linears = {name: linear for name, linear in self._linears.items() if name not in reasons}
        mixtures = [mixture for mixture in self._experts.mixtures if mixture.linears.keys() & linears.keys()]
        sizes = (self._widest_bytes, self._kept_bytes)
        return BlockSurvey(self.block, linears, groups, self._input_bytes, reasons, mixtures, *sizes)


def survey(
    model: nn.Module,
    blocks: Sequence[Block],
    linears: Mapping[str, nn.Linear],
    call: Call,
    kind: Callable[[str], Hashable] = lambda _: None,
    mixtures: Sequence[Mixture] = (),
) -> list[BlockSurvey]:
    """Run the first batch through the whole model, and survey ``blocks`` in calling order.

    kind: Linears for whose names it differs are not put into one group. mixtures: what may be experts.

    A block that is called twice in one forward cannot be finished after its first call: then the whole model counts as one
    block. Raises CalibrationError when the model rejects the batch.
    """
    order: list[_BlockWatch] = []
    with Hooks() as on:
        for block in blocks:
            _BlockWatch(block, linears, mixtures).put_on(on, order)
        with torch.no_grad():
            # on copies: a model that writes its input must find the batch untouched when it is calibrated
            run_call(model, call.on_copies(), 0)
    if len(set(order)) < len(order):
        return survey(model, [Block("", model)], linears, call, kind, mixtures)
    return [watch.survey(kind) for watch in order]


def reasons_to_stay(eligible: Eligible, surveys: Sequence[BlockSurvey]) -> dict[str, str]:
    """Tell why each Linear that is in no scale group stays float."""
    inside = {name for s in surveys for name in linears_of(s.block, eligible.linears)}
    grouped = {name for s in surveys for group in s.groups for name in group.linears}
    routers = {name: reason for s in surveys for name, reason in s.reasons.items()}
    left = [name for name in eligible.linears if name not in grouped and name not in routers]
    why = {True: "not called by the first calibration batch", False: "outside the calibrated blocks"}
    return eligible.reasons | routers | {name: why[name in inside] for name in left}
