"""See before quantizing whether a format of files will hold what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoints.formats import layout
from ..checkpoints.formats.packed import middle_code
from ..checkpoints.model_source import ModelSource, config_of, float_linears
from ..checkpoints.renaming import Renamed
from ..checkpoints.write import summarize
from ..config import AwqConfig, configured
from ..layers.quant_linear import QuantLinear
from ..modules import unwrapped
from ..pipeline.plan import planned
from ..pipeline.session import Session, session
from ..reporting.readers import DEFAULT_FORMAT


def check_format(
    model: nn.Module,
    example_batch: Any,
    format: str = DEFAULT_FORMAT,
    config: AwqConfig | Mapping[str, Any] | None = None,
    *,
    tokenizer: Callable[..., Any] | None = None,
    inputs: str | Callable[[Any], Any] = "all",
    blocks: Sequence[str] | None = None,
    **overrides: Any,
) -> None:
    """Check, before the work, that ``format`` can hold what :func:`awq_ext.quantize` would make of ``model`` with these settings.

    example_batch: one sample as ``calib_loader`` would give it; all other arguments are those of ``quantize``, and of
    :func:`awq_ext.save_pretrained`. The model's own forward runs once to find the layers (with ``fold="auto"`` some tens of times,
    to find which scales would be left to run time, unless the format is "native"); the model is not changed.
    Raises CheckpointError that lists every layer, shape and setting which does not fit, with the choice that mends it. What
    depends on the values of the weights (a zero of 0 in "gptq") is found when saving.
    """
    target, config = layout(format), configured(config, overrides)
    with session(unwrapped(model), [example_batch], config, tokenizer, inputs) as opened:
        for name, (linear, at_run_time) in _chosen(opened, blocks, target.name != "native").items():
            settings = opened.config.for_layer(name)
            if settings.packed:
                opened.journal.set_module(opened.model, name, _stand_in(linear, settings, at_run_time))
        opened.standins.put_back(opened.model, opened.journal)
        source = Renamed(ModelSource(opened.model), opened.model, to_files=True)
        floats = source.linears(float_linears(opened.model))
        summarize(source, target, floats, "nothing was quantized yet")
        target.foresee(source, config_of(opened.model))


def _chosen(opened: Session, blocks: Sequence[str] | None, scales: bool) -> dict[str, tuple[nn.Linear, bool]]:
    """Find the Linears that will be quantized, and (with ``scales``) whether their scale will be left to run time."""
    model, config = opened.model, opened.config
    if scales and config.fold == "auto":
        groups = planned(opened, 1, blocks).groups
        return {name: (model.get_submodule(name), one.fold == "run time") for one in groups for name in one.layers}
    with opened.surveyed(blocks) as surveys:
        linears = {name: one.linears[name] for one in surveys for group in one.groups for name in group.linears}
    never = config.fold == "never"
    return {name: (linear, never and config.for_layer(name).searches_scale) for name, linear in linears.items()}


def _stand_in(linear: nn.Linear, settings: AwqConfig, at_run_time: bool) -> QuantLinear:
    """Make a layer of the shape and settings of the one to be; its codes are memory that nobody touches."""
    kind = {"scale_dtype": settings.torch_scale_dtype, "bits": settings.bits}
    layer = QuantLinear.empty_like(linear, settings.group_size, at_run_time, **kind)
    zero = middle_code(settings.bits) - (not settings.symmetric)  # any other than the middle says that there are zeros
    layer.zeros = torch.full_like(layer.zeros, zero)
    layer.scales = torch.ones_like(layer.scales)  # which every format holds: those to come are not known
    layer.bias = linear.bias
    return layer
