"""plan(): what quantize() would do to a model, before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..calibration.importance import weighing_bytes
from ..calibration.windows import can_be_cut, count_tokens
from ..config import AwqConfig, configured
from ..folding.finder import FoldFinder
from ..folding.fold import Fold, NormFold
from ..forwards.forked import finishing_after_fork
from ..forwards.probe import Probe
from ..forwards.recall import Recall
from ..modules import foldable_norms, unwrapped
from ..reporting.tables import aligned, format_bytes
from ..solving.block_solver import takes_fold
from ..survey.budget import planned_bytes
from ..survey.survey import BlockSurvey, reasons_to_stay
from ..undo.thread_state import restoring
from .session import Session, session
from .tuning import planned_tuning_bytes


@dataclass(frozen=True)
class GroupPlan:
    """Linears that read one input and so share one scale, in calling order.

    fold: what takes over 1/s of the scale s: "norm" or "linear" (``producer`` is its name), "run time" (a division in the layer),
    "weights" (fake-quantized weights hold both) or "" (no scale is searched, or fold="always" finds nothing to fold into). Once
    quantize() has statistics it may still choose the identity, or a division at run time in place of a fold.
    weights: how many the group has. bits and group_size: of each layer.
    """

    block: str
    layers: tuple[str, ...]
    in_features: int
    weights: int
    fold: str
    producer: str
    method: str
    bits: tuple[int, ...]
    group_size: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What :func:`awq_ext.quantize` would do; ``print`` shows it as a table.

    stays_float: name -> reason of every Linear that will not be quantized. parameters: number of all in the model.
    planned_memory_bytes: peak of what quantizing takes beside the model; what a forward of the whole model takes is not in it.
    """

    groups: list[GroupPlan]
    stays_float: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    planned_memory_bytes: int = 0

    @property
    def share_quantized(self) -> float:
        """Weights to be quantized / all parameters of the model, in [0, 1]."""
        return sum(group.weights for group in self.groups) / max(self.parameters, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return dataclasses.asdict(self) | {"share_quantized": self.share_quantized}

    def __str__(self) -> str:
        rows = [("block", "layers", "inputs", "method", "bits", "group", "1/s goes to")]
        rows += [_cells(group) for group in self.groups]
        stays = [("stays float", "why"), *self.stays_float.items()] if self.stays_float else []
        layers = sum(len(group.layers) for group in self.groups)
        summary = (
            f"{layers} Linears in {len(self.groups)} scale groups to quantize ({self.share_quantized:.1%} of all "
            f"parameters), {len(self.stays_float)} stay float; planned peak memory beside the model: "
            f"{format_bytes(self.planned_memory_bytes)}"
        )
        return "\n".join([*aligned(rows), "", *aligned(stays), *([""] if stays else []), summary])


def _cells(group: GroupPlan) -> tuple[str, ...]:
    prefix = f"{group.block}." if group.block else ""
    place = f"{group.fold} {group.producer.removeprefix(prefix)}".strip() or "no scale"
    return (
        group.block or "(whole model)",
        ", ".join(name.removeprefix(prefix) for name in group.layers),
        str(group.in_features),
        group.method,
        "/".join(map(str, dict.fromkeys(group.bits))),
        "/".join(dict.fromkeys(_group_cell(size, group.in_features) for size in group.group_size)),
        place,
    )


def _group_cell(size: int, in_features: int) -> str:
    return str(size) if 0 < size <= in_features else f"{in_features} (whole row)"


@finishing_after_fork
@restoring
def plan(
    model: nn.Module,
    example_batch: Any,
    config: AwqConfig | Mapping[str, Any] | None = None,
    *,
    tokenizer: Callable[..., Any] | None = None,
    inputs: str | Callable[[Any], Any] = "all",
    blocks: Sequence[str] | None = None,
    batches: int = 1,
    **overrides: Any,
) -> Plan:
    """Find the scale groups and folds of ``model`` with one batch, without changing the model and without statistics.

    example_batch: one sample as ``calib_loader`` of :func:`awq_ext.quantize` would give it. batches: how many batches of this size
    the calibration will have; the planned memory depends on it. All other arguments are those of ``quantize``. Takes about as long
    as some tens of forwards of the batch. Raises what ``quantize`` would raise for the same arguments.
    """
    config = configured(config, overrides)
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise ValueError(f"batches={batches!r}: a number of calibration batches, at least 1, is needed")
    with session(unwrapped(model), [example_batch], config, tokenizer, inputs) as opened:
        return planned(opened, batches, blocks)


def planned(opened: Session, batches: int, blocks: Sequence[str] | None) -> Plan:
    """Make the plan of a session: see :func:`plan`."""
    model, config = opened.model, opened.config
    names = {id(module): name for name, module in model.named_modules()}
    found: list[GroupPlan] = []
    with opened.surveyed(blocks) as surveys, opened.visits(surveys, opened.calls[:1]) as visits:
        finder = FoldFinder(foldable_norms(model))
        for surveyed, (first, *_) in visits:
            wanted = [takes_fold(group, config) for group in surveyed.groups]
            folds: list[Fold | None] = [None] * len(wanted)
            if any(wanted):
                recall = Recall(surveyed.linears.values())
                probe = Probe(first.run_on_copies, recall.keep(first.run_on_copies)(), first.call.row_mask, recall)
                folds = finder.find(probe, surveyed.groups, surveyed.linears, wanted)
            for group, fold in zip(surveyed.groups, folds, strict=True):
                linears = [surveyed.linears[name] for name in group.linears]
                found.append(_planned(surveyed.block.name, group.linears, linears, fold, config, names))
    return Plan(
        groups=found,
        stays_float=reasons_to_stay(opened.eligible, surveys),
        parameters=sum(p.numel() for p in model.parameters()),
        planned_memory_bytes=_planned_memory(opened, surveys, batches),
    )


def _planned_memory(opened: Session, surveys: Sequence[BlockSurvey], batches: float) -> int:
    """Estimate the bytes that quantizing takes beside the model, with ``batches`` times the calls of the session."""
    config, calls = opened.config, opened.calls
    tokens, builtin = count_tokens(calls), count_tokens(opened.builtin)
    if config.max_calib_tokens and tokens and all(map(can_be_cut, calls)):
        batches = min(batches, max(config.max_calib_tokens - builtin, tokens) / tokens)
    more = sum(call.elements for call in opened.builtin) / max(calls[0].elements, 1)
    peak = planned_bytes(surveys, batches * len(calls) + more, config)
    if config.weighs_rows:
        peak = max(peak, weighing_bytes(opened.model, calls, surveys, config.weighed_batches))
    return peak + planned_tuning_bytes(surveys, calls, batches, config)


def _planned(
    block: str,
    layers: tuple[str, ...],
    linears: Sequence[nn.Linear],
    fold: Fold | None,
    config: AwqConfig,
    names: dict[int, str],
) -> GroupPlan:
    settings = [config.for_layer(name) for name in layers]
    place, producer = "", ""
    if fold is not None:
        place, producer = "norm" if isinstance(fold, NormFold) else "linear", names[id(fold.module)]
    elif settings[0].searches_scale and not settings[0].packed:
        place = "weights"
    elif settings[0].searches_scale and config.fold != "always":
        place = "run time"
    return GroupPlan(
        block=block,
        layers=layers,
        in_features=linears[0].in_features,
        weights=sum(linear.weight.numel() for linear in linears),
        fold=place,
        producer=producer,
        method=settings[0].method,
        bits=tuple(one.bits for one in settings),
        group_size=tuple(one.group_size for one in settings),
    )
