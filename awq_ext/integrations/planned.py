"""Tell before a model is quantized whether a layout will hold it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.formats import Layout, PackedLinear, layout
from ..checkpoints.model_source import float_linears
from ..checkpoints.renaming import Renamed
from ..checkpoints.write import summarize
from ..config import AwqConfig
from ..modules import unwrapped
from ..pipeline.plan import plan
from ..pipeline.session import session
from ..survey.survey import reasons_to_stay


class _Floats:
    """The float model, its experts taken apart, as a source of files: to see which experts files have names for."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = dict(model.named_parameters())
        self.layers: Mapping[str, Any] = {}
        self.floats = list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype


class _Planned:
    """The layers that will be quantized, as a source for ``summarize``: with all that is known of them before."""

    def __init__(self, layers: Mapping[str, PackedLinear], experts: Mapping[str, str]) -> None:
        self.layers, self.experts, self.in_memory, self.floats = layers, experts, None, ()

    def outline(self, name: str) -> PackedLinear:
        return self.layers[name]


def check_format(model: nn.Module, batch: Tensor, format: str, settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError, with every reason and what to do, where ``format`` cannot hold what ``quantize`` would make.

    batch: one calibration sample; settings: fields of AwqConfig. Takes a forward of the batch, or with a format that has no
    place for run-time scales and another ``fold`` than "always", some tens. Zeros are not known before, nor scales that do not
    fit the format's dtype.
    """
    target, config = layout(format), AwqConfig(**settings)
    scaled: set[str] = set()
    if not target.run_time_scales and config.fold != "always":
        found = plan(model, batch, config)
        scaled = {name for group in found.groups if group.fold == "run time" for name in group.layers}
    whole = unwrapped(model)
    with session(whole, [batch], config) as opened:
        with opened.surveyed(None) as surveys:
            stay = reasons_to_stay(opened.eligible, surveys)
        wanted = {name: linear for name, linear in opened.eligible.linears.items() if name not in stay}
        layers = {
            name: _outline(linear, config.for_layer(name), name in scaled, target) for name, linear in wanted.items()
        }
        experts = Renamed(_Floats(whole), whole, to_files=True).experts
        kept = {n: use for n, use in experts.items() if any(name.startswith(f"{n}.") for name in layers)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is worth a warning is said when the model is saved
            summarize(_Planned(layers, kept), target, [name for name in float_linears(whole) if name not in layers])


def _outline(linear: nn.Linear, config: AwqConfig, scaled: bool, target: Layout) -> PackedLinear:
    n, k = linear.out_features, linear.in_features
    size = config.group_size
    groups = 1 if size == -1 else -(-k // size)
    # the middle code, or any other: a layout that has no zeros refuses these
    zeros = torch.full((n, groups), 8 if config.symmetric else 7, dtype=torch.uint8)
    return PackedLinear(
        qweight=torch.empty(n, (k + 1) // 2, dtype=torch.uint8, device="meta"),
        scales=torch.zeros(n, groups, dtype=target.scale_dtypes[0]),
        zeros=zeros,
        in_features=k,
        group_size=size,
        pre_quant_scale=torch.ones(k) if scaled else None,
    )
